"""Pages of the phone itself: launcher grid, settings list, and dialogs over any page."""

from __future__ import annotations

from autoglm.train.world.canvas import UNITS, Box, Canvas, Color, Element, overlaps
from autoglm.train.world.labels import APPS, SETTINGS, Label
from autoglm.train.world.pages import (
    MARGIN,
    WHITE,
    PageState,
    app_icon,
    button,
    clock_time,
    draw_some,
    hue_of,
    label,
    one_of,
    status_bar,
    title_bar,
    words,
)
from autoglm.train.world.wallpapers import draw_wallpaper, hsv

INK_ON_LIGHT: Color = (18, 18, 22)
DIALOG_BUTTONS = (
    ("allow", "deny"),
    ("ok", "cancel"),
    ("delete", "cancel"),
    ("save", "cancel"),
    ("login", "skip"),
    ("retry", "cancel"),
    ("share", "save", "cancel"),
    ("save", "delete", "cancel"),
    ("ok",),
    ("retry", "skip"),
)


def _launcher_cell(
    canvas: Canvas, app: Label, cell: Box, icon_size: float, text_size: float, *, tint: float | None
) -> None:
    style = canvas.style
    x = (cell[0] + cell[2]) / 2 + canvas.uniform(-4, 4)
    named = text_size > 0
    block = icon_size + (text_size * 1.55 if named else 0)
    top = (cell[1] + cell[3] - block) / 2
    inks = [app_icon(canvas, app, (x, top + icon_size / 2), icon_size, tint)]
    if named:
        text = app.text(style.language)
        size = canvas.fit(text, text_size, cell[2] - cell[0] - 16)
        color, shadow = (WHITE, (20, 20, 24)) if style.dark else (INK_ON_LIGHT, None)
        inks.append(
            canvas.text((x, top + icon_size + text_size * 0.95), text, size, color, align="center", shadow=shadow)
        )
    canvas.element(app, "app", cell, inks)


def launcher(canvas: Canvas) -> PageState:
    """A wallpaper, a grid of 12 to 20 apps and a dock of four more, at times without names."""
    style = canvas.style
    canvas.image.paste(draw_wallpaper(canvas.rng, style.split, canvas.image.size, dark=style.dark), (0, 0))
    ink = WHITE if style.dark else INK_ON_LIGHT
    status_bar(canvas, ink)
    has_dock = canvas.chance(0.8)
    columns = one_of(canvas, (3, 4, 4, 4))
    top, bottom = 120.0, canvas.height - (330 if has_dock else 80)
    if canvas.chance(0.35):
        canvas.text((UNITS / 2, top + 130), clock_time(canvas), 170, ink, align="center")
        top += 280
    rows = min(6 if columns == 3 else 5, int((bottom - top) / 290))
    rows = canvas.integer(max(3, rows - 1), rows)
    apps = draw_some(canvas, APPS, rows * columns + (4 if has_dock else 0))
    grid, dock = apps[: rows * columns], apps[rows * columns :]
    if canvas.chance(0.3):  # a last row that is not full
        grid = grid[: len(grid) - canvas.integer(0, columns - 1)]
    cell_width, cell_height = (UNITS - 40) / columns, (bottom - top) / rows
    icon_size = min(canvas.uniform(150, 185), cell_width - 40, cell_height - 110)
    text_size = canvas.uniform(38, 46) * style.font_scale
    shared = float(canvas.rng.random()) if canvas.chance(0.15) else None
    for index, app in enumerate(grid):
        x, y = 20 + (index % columns) * cell_width, top + (index // columns) * cell_height
        _launcher_cell(canvas, app, (x, y, x + cell_width, y + cell_height), icon_size, text_size, tint=shared)
    if has_dock:
        y = canvas.height - 310
        if canvas.chance(0.6):
            shade = 40 if style.dark else 235
            canvas.rect((30, y, UNITS - 30, canvas.height - 40), (shade, shade, shade + 8), 70)
        named = canvas.chance(0.8)
        for index, app in enumerate(dock):
            x = 30 + index * 255
            _launcher_cell(
                canvas,
                app,
                (x, y, x + 255, canvas.height - 40),
                icon_size * 0.95,
                text_size if named else 0.0,
                tint=shared,
            )
    return PageState(label("page", "launcher"), None)


def _switch(canvas: Canvas, right: float, y: float) -> None:
    on = canvas.chance(0.5)
    canvas.rect((right - 110, y - 32, right, y + 32), canvas.style.accent if on else canvas.style.line, 32)
    x = right - 32 if on else right - 78
    canvas.rect((x - 25, y - 25, x + 25, y + 25), WHITE, 25)


def _setting_row(canvas: Canvas, named: Label, box: Box, size: float, *, icons: str, card: bool) -> None:
    style = canvas.style
    middle = (box[1] + box[3]) / 2
    x = MARGIN + (24 if card else 0)
    inks: list[Box] = []
    if icons != "none" and named.icon is not None:
        if icons == "tile":
            tile = (x, middle - 46, x + 92, middle + 46)
            canvas.rect(tile, hsv(hue_of(named), 0.65, 0.8), style.radius * 92)
            canvas.icon(named.icon, (x + 46, middle), 62, WHITE)
            inks.append(tile)
        else:
            inks.append(canvas.icon(named.icon, (x + 46, middle), 82, style.text))
        x += 92 + 36
    inks.append(canvas.text((x, middle), named.text(style.language), size, style.text))
    right = UNITS - MARGIN - (24 if card else 0)
    if canvas.chance(0.3):
        _switch(canvas, right, middle)
    else:
        canvas.lines([(right - 22, middle - 20), (right - 2, middle), (right - 22, middle + 20)], style.secondary, 6)
        if canvas.chance(0.3):
            value = words(canvas, "已开启|已关闭|自动|56%|128 GB", "On|Off|Auto|56%|128 GB")
            canvas.text((right - 50, middle), value, 42, style.secondary, align="right")
    canvas.element(named, "row", box, inks)


def settings_list(canvas: Canvas) -> PageState:
    """Rows of settings under the title of the settings app."""
    style = canvas.style
    app = label("app", "settings")
    actions = (label("button", "search"),) if canvas.chance(0.3) else ()
    top = title_bar(canvas, app, actions=actions) + canvas.uniform(10, 60)
    size = canvas.uniform(48, 58) * style.font_scale
    row_height = max(canvas.uniform(150, 205), size * 2.4)
    count = min(len(SETTINGS), int((canvas.height - top - 60) / row_height), canvas.integer(6, 10))
    icons = one_of(canvas, ("none", "tile", "tile", "line"))
    card = canvas.chance(0.4)
    if card:
        canvas.rect((24, top, UNITS - 24, top + count * row_height), style.surface, 40)
    for index, named in enumerate(draw_some(canvas, SETTINGS, count)):
        y = top + index * row_height
        if index and canvas.chance(0.8):
            canvas.rect((MARGIN + 24, y, UNITS - MARGIN, y + 3), style.line)
        _setting_row(canvas, named, (0, y, UNITS, y + row_height), size, icons=icons, card=card)
    return PageState(label("page", "settings_list"), app)


def _dim(canvas: Canvas) -> None:
    keep = canvas.uniform(0.35, 0.55)
    canvas.image.paste(canvas.image.point([int(value * keep) for value in range(256)] * 3), (0, 0))


def _elements_below(canvas: Canvas, panel: Box) -> list[Element]:
    """What stays visible around the panel, no longer tappable."""
    cover = canvas.fraction(panel)
    return [
        Element(element.label, "dimmed", element.box, element.ink, False)
        for element in canvas.elements
        if not overlaps(element.ink, cover)
    ]


def dialog(canvas: Canvas, below: PageState) -> PageState:
    """A panel with an app's name, a sentence and one to three buttons over the page `below`, which is dimmed."""
    style = canvas.style
    _dim(canvas)
    names = one_of(canvas, DIALOG_BUTTONS)
    buttons = [label("button", name) for name in names]
    if canvas.chance(0.3):
        buttons.reverse()
    stacked = len(buttons) > 2 or canvas.chance(0.25)
    size = canvas.uniform(50, 58) * style.font_scale
    app = below.app
    if app is None:
        shown = {element.label.key for element in canvas.elements}
        app = one_of(canvas, [candidate for candidate in APPS if candidate.key not in shown] or list(APPS))
    title_height, text_height = 190.0, 150.0
    button_height = 150.0
    height = title_height + text_height + 50 + (len(buttons) if stacked else 1) * (button_height + 20)
    sheet = canvas.chance(0.3)
    left = 24.0 if sheet else canvas.uniform(70, 120)
    top = canvas.height - height - 60 if sheet else (canvas.height - height) / 2 + canvas.uniform(-200, 200)
    panel = (left, top, UNITS - left, top + height)
    canvas.elements = _elements_below(canvas, panel)
    canvas.rect(panel, style.surface, 30 + 60 * style.radius)
    _dialog_title(canvas, app, panel, title_height)
    sentence = words(
        canvas,
        "需要你的选择|要继续吗？|此操作需要确认|请选择下一步",
        "Do you want to continue?|Please make a choice|This needs your answer",
    )
    width = panel[2] - panel[0]
    canvas.text(
        (UNITS / 2, top + title_height + 40),
        sentence,
        canvas.fit(sentence, 48, width - 80),
        style.secondary,
        align="center",
    )
    y = top + title_height + text_height
    bare = canvas.chance(0.25)
    for index, named in enumerate(buttons):
        if stacked:
            box = (
                panel[0] + 40,
                y + index * (button_height + 20),
                panel[2] - 40,
                y + index * (button_height + 20) + button_height,
            )
        else:
            each = (width - 40) / len(buttons)
            box = (panel[0] + 20 + index * each + 10, y, panel[0] + 20 + (index + 1) * each - 10, y + button_height)
        filled = not bare and named.key in ("allow", "ok", "login", "retry", "save")
        button(canvas, named, box, filled=filled, size=size, bare=bare)
    return PageState(label("page", "dialog"), app)


def _dialog_title(canvas: Canvas, app: Label, panel: Box, height: float) -> None:
    style = canvas.style
    middle = panel[1] + height / 2 + 10
    text = app.text(style.language)
    size = canvas.uniform(56, 66)
    width = canvas.text_width(text, size, bold=True)
    inks: list[Box] = []
    x = UNITS / 2
    if canvas.chance(0.6):
        inks.append(app_icon(canvas, app, (x - width / 2 - 15, middle), 100))
        x += 60
    inks.append(canvas.text((x, middle), text, size, style.text, align="center", bold=True))
    canvas.element(app, "title", (panel[0], middle - 60, panel[2], middle + 60), inks, tappable=False)
