"""Pages inside apps: search, chat list, chat, shop, and any of them still loading."""

from __future__ import annotations

from collections.abc import Sequence

from autoglm.train.world.canvas import UNITS, Box, Canvas
from autoglm.train.world.labels import APPS, CONTACTS, MESSAGES, PRODUCTS, SETTINGS, Label
from autoglm.train.world.pages import (
    MARGIN,
    STATUS_HEIGHT,
    WHITE,
    PageState,
    app_icon,
    back_arrow,
    button,
    clock_time,
    draw_some,
    hue_of,
    keyboard,
    label,
    one_of,
    price,
    spinner,
    status_bar,
    tab_bar,
    text_field,
    title_bar,
    words,
)
from autoglm.train.world.wallpapers import hsv

# Which things an app's search finds.
SEARCHED: dict[str, tuple[Label, ...]] = {
    "browser": PRODUCTS + APPS,
    "store": APPS,
    "files": APPS,
    "settings": SETTINGS,
    "taobao": PRODUCTS,
    "meituan": PRODUCTS,
    "wechat": CONTACTS,
}
SHOPS = ("taobao", "meituan", "store")
LOADING_APPS = {
    "wechat": "chat_list",
    "taobao": "shop",
    "meituan": "shop",
    "store": "shop",
    "browser": "search_page",
    "settings": "settings_list",
}


def _hue(canvas: Canvas, who: Label) -> float:
    """A portrait's colour; half of them say nothing of whose they are, so that names are read."""
    return hue_of(who) if canvas.chance(0.5) else canvas.uniform(0, 1)


def _avatar(canvas: Canvas, hue: float, center: tuple[float, float], size: float) -> Box:
    half = size / 2
    box = (center[0] - half, center[1] - half, center[0] + half, center[1] + half)
    canvas.rect(box, hsv(hue, 0.5, 0.75), canvas.style.radius * size)
    canvas.rect(
        (center[0] - size * 0.16, center[1] - size * 0.3, center[0] + size * 0.16, center[1] + size * 0.02),
        WHITE,
        size * 0.16,
    )
    canvas.rect(
        (center[0] - size * 0.28, center[1] + size * 0.08, center[0] + size * 0.28, center[1] + size * 0.34),
        WHITE,
        size * 0.2,
    )
    return box


def _picture(canvas: Canvas, named: Label, center: tuple[float, float], size: float) -> Box:
    """The small picture before a row's text, after the thing's kind."""
    if named.kind == "contact":
        return _avatar(canvas, _hue(canvas, named), center, size)
    if named.kind == "app":
        return app_icon(canvas, named, center, size)
    assert named.icon is not None
    return canvas.icon(named.icon, center, size * 0.9, canvas.style.text)


def search_page(canvas: Canvas) -> PageState:
    """A text field with a search button, and what was found; with the field focused, a keyboard."""
    style = canvas.style
    app = label("app", one_of(canvas, tuple(SEARCHED)))
    focused = canvas.chance(0.5)
    top = title_bar(canvas, app)
    find = label("button", "search")
    height = 120.0
    icon_only = canvas.chance(0.3)
    size = 50 * style.font_scale
    room = 130.0 if icon_only else canvas.text_width(find.text(style.language), size, bold=True) + 70
    field = (MARGIN, top + 10, UNITS - MARGIN - room, top + 10 + height)
    text_field(
        canvas,
        field,
        focused=focused,
        hint=words(canvas, "输入内容|想找什么？|请输入", "Type here|What are you looking for?|Enter words"),
    )
    box = (field[2] + 10, field[1], UNITS - MARGIN + 10, field[3])
    if icon_only:
        assert find.icon is not None
        ink = canvas.icon(find.icon, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), 84, style.accent)
        canvas.element(find, "icon", box, [ink])
    else:
        button(canvas, find, box, filled=canvas.chance(0.4), size=size, bare=canvas.chance(0.3))
    bottom = keyboard(canvas) if focused else canvas.height - 60
    _results(canvas, [named for named in SEARCHED[app.key] if named != app], field[3] + canvas.uniform(30, 70), bottom)
    return PageState(label("page", "search_page"), app, keyboard=focused, field_focused=focused)


def _results(canvas: Canvas, found: Sequence[Label], top: float, bottom: float) -> None:
    style = canvas.style
    size = canvas.uniform(48, 58) * style.font_scale
    row = max(canvas.uniform(150, 200), size * 2.4)
    pictures = canvas.chance(0.7)
    count = min(int((bottom - top) / row), canvas.integer(3, 8), len(found))
    for index, named in enumerate(draw_some(canvas, found, count)):
        y = top + index * row
        middle = y + row / 2
        x = MARGIN
        inks: list[Box] = []
        if pictures:
            inks.append(_picture(canvas, named, (x + 50, middle), 100))
            x += 100 + 36
        inks.append(canvas.text((x, middle), named.text(style.language), size, style.text))
        if canvas.chance(0.5):
            detail = words(
                canvas,
                "热门|附近|{n} 条|新".replace("{n}", str(canvas.integer(2, 99))),
                f"{canvas.integer(2, 99)} hits|popular|nearby",
            )
            canvas.text((UNITS - MARGIN, middle), detail, 40, style.secondary, align="right")
        canvas.rect((x, y + row - 3, UNITS - MARGIN, y + row), style.line)
        canvas.element(named, "row", (0, y, UNITS, y + row), inks)


PREVIEWS_ZH = "明天几点出发？|材料收到了|周末一起爬山|[图片]|今天真热|哈哈哈|记得带伞|在路上了吗"
PREVIEWS_EN = "What time tomorrow?|Got the papers|Hiking on Sunday?|[Picture]|So hot today|Ha ha ha|Where are you?"


def chat_list(canvas: Canvas) -> PageState:
    """People written with, the last words and when."""
    style = canvas.style
    app = label("app", "wechat")
    actions = (label("button", "search"),) if canvas.chance(0.5) else ()
    top = title_bar(canvas, app, actions=actions) + 10
    bottom = tab_bar(canvas) if canvas.chance(0.6) else canvas.height - 60
    row = canvas.uniform(200, 250)
    size = canvas.uniform(50, 58) * style.font_scale
    count = min(len(CONTACTS), int((bottom - top) / row), canvas.integer(4, 8))
    previews = canvas.chance(0.8)
    for index, who in enumerate(draw_some(canvas, CONTACTS, count)):
        y = top + index * row
        middle = y + row / 2
        _avatar(canvas, _hue(canvas, who), (MARGIN + 68, middle), 136)
        x = MARGIN + 136 + 40
        ink = canvas.text(
            (x, middle - (38 if previews else 0)), who.text(style.language), size, style.text, bold=canvas.chance(0.3)
        )
        if previews:
            canvas.text((x, middle + 46), words(canvas, PREVIEWS_ZH, PREVIEWS_EN), 40, style.secondary)
        canvas.text((UNITS - MARGIN, middle - 36), clock_time(canvas), 38, style.secondary, align="right")
        canvas.rect((x, y + row - 3, UNITS, y + row), style.line)
        canvas.element(who, "row", (0, y, UNITS, y + row), [ink])
    return PageState(label("page", "chat_list"), app)


def chat(canvas: Canvas) -> PageState:
    """A talk with one person: name, bubbles, a text field and a send button; with the field focused, a keyboard."""
    style = canvas.style
    app = label("app", "wechat")
    middle = STATUS_HEIGHT + 75
    status_bar(canvas, style.text)
    back_arrow(canvas, middle, style.text)
    ink = canvas.text((MARGIN + 50, middle), app.text(style.language), 52 * min(style.font_scale, 1.1), style.text)
    canvas.element(app, "title", (MARGIN, middle - 60, ink[2] + 10, middle + 60), [ink], tappable=False)
    who = one_of(canvas, CONTACTS)
    size = canvas.uniform(56, 66)
    left = max(UNITS / 2, ink[2] + 60 + canvas.text_width(who.text(style.language), size, bold=True) / 2)
    ink = canvas.text((left, middle), who.text(style.language), size, style.text, align="center", bold=True)
    canvas.element(who, "heading", (ink[0] - 20, middle - 60, ink[2] + 20, middle + 60), [ink], tappable=False)
    top = STATUS_HEIGHT + 150
    canvas.rect((0, top, UNITS, top + 3), style.line)
    focused = canvas.chance(0.5)
    bottom = keyboard(canvas) if focused else canvas.height - 40
    _input_bar(canvas, bottom, focused=focused)
    _bubbles(canvas, who, top + 30, bottom - 190)
    return PageState(label("page", "chat"), app, keyboard=focused, field_focused=focused)


def _input_bar(canvas: Canvas, bottom: float, *, focused: bool) -> None:
    style = canvas.style
    send = label("button", "send")
    top = bottom - 170
    canvas.rect((0, top, UNITS, bottom), style.surface)
    size = 50 * style.font_scale
    icon_only = canvas.chance(0.3)
    room = 140.0 if icon_only else canvas.text_width(send.text(style.language), size, bold=True) + 90
    field = (MARGIN, top + 28, UNITS - MARGIN - room, bottom - 28)
    text_field(canvas, field, focused=focused, hint=words(canvas, "说点什么|输入内容", "Write something|Type here"))
    box = (field[2] + 16, top + 24, UNITS - MARGIN + 16, bottom - 24)
    if icon_only:
        assert send.icon is not None
        ink = canvas.icon(send.icon, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), 84, style.accent)
        canvas.element(send, "icon", box, [ink])
    else:
        button(canvas, send, box, filled=canvas.chance(0.7), size=size)


def _bubbles(canvas: Canvas, who: Label, top: float, bottom: float) -> None:
    style = canvas.style
    size = canvas.uniform(50, 58) * style.font_scale
    step = canvas.uniform(190, 230)
    count = min(int((bottom - top) / step), canvas.integer(2, 6), len(MESSAGES))
    mine_color = hsv(0.3 if canvas.chance(0.5) else canvas.uniform(0, 1), 0.45, 0.45 if style.dark else 0.9)
    portrait = _hue(canvas, who)
    for index, message in enumerate(draw_some(canvas, MESSAGES, count)):
        middle = top + index * step + step / 2
        mine = canvas.chance(0.5)
        text = message.text(style.language)
        width = canvas.text_width(text, size) + 90
        avatar_x = UNITS - MARGIN - 55 if mine else MARGIN + 55
        if mine:
            canvas.rect((avatar_x - 55, middle - 55, avatar_x + 55, middle + 55), style.secondary, style.radius * 110)
            box = (avatar_x - 85 - width, middle - 75, avatar_x - 85, middle + 75)
        else:
            _avatar(canvas, portrait, (avatar_x, middle), 110)
            box = (avatar_x + 85, middle - 75, avatar_x + 85 + width, middle + 75)
        canvas.rect(box, mine_color if mine else style.surface, 20 + 40 * style.radius)
        ink = canvas.text((box[0] + 45, middle), text, size, style.text)
        canvas.element(message, "bubble", box, [ink])


def shop(canvas: Canvas) -> PageState:
    """A shop: a grid of goods, or one thing with its price and buttons."""
    app = label("app", one_of(canvas, SHOPS))
    if canvas.chance(0.5):
        _goods(canvas, app)
    else:
        _thing(canvas, app)
    return PageState(label("page", "shop"), app)


def _tile(canvas: Canvas, named: Label, box: Box) -> Box:
    """A picture of a thing on sale: its icon large on a pale ground; returns the icon's ink."""
    assert named.icon is not None
    style = canvas.style
    value = 0.3 if style.dark else 0.95
    canvas.rect(box, hsv(hue_of(named), 0.18, value), 30)
    size = min(box[2] - box[0], box[3] - box[1]) * 0.6
    color = hsv(hue_of(named), 0.6, 0.85 if style.dark else 0.45)
    return canvas.icon(named.icon, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), size, color)


def _goods(canvas: Canvas, app: Label) -> None:
    style = canvas.style
    choices = [action for action in (label("button", "search"), label("button", "cart")) if canvas.chance(0.5)]
    top = title_bar(canvas, app, actions=choices) + 20
    bottom = tab_bar(canvas) - 10 if canvas.chance(0.4) else canvas.height - 40
    columns = 2
    cell_height = canvas.uniform(480, 600)
    rows = max(1, min(int((bottom - top) / cell_height), 3))
    cell_width = (UNITS - 60) / columns
    size = canvas.uniform(48, 56) * style.font_scale
    for index, named in enumerate(draw_some(canvas, PRODUCTS, rows * columns)):
        x, y = 30 + (index % columns) * cell_width, top + (index // columns) * cell_height
        card = (x + 14, y + 14, x + cell_width - 14, y + cell_height - 14)
        canvas.rect(card, style.surface, 34)
        ink = _tile(canvas, named, (card[0] + 20, card[1] + 20, card[2] - 20, card[3] - 180))
        text = canvas.text((card[0] + 36, card[3] - 132), named.text(style.language), size, style.text)
        canvas.text((card[0] + 36, card[3] - 56), price(canvas), 46, (226, 70, 40))
        canvas.element(named, "item", card, [ink, text])


def _thing(canvas: Canvas, app: Label) -> None:
    style = canvas.style
    share, favorite = label("button", "share"), label("button", "favorite")
    top = title_bar(canvas, app, actions=(share,) if canvas.chance(0.5) else ()) + 10
    named = one_of(canvas, PRODUCTS)
    bar = canvas.height - 200
    picture = (30.0, top, UNITS - 30, top + min(canvas.uniform(700, 1000), bar - top - 330))
    ink = _tile(canvas, named, picture)
    middle = picture[3] + 90
    size = canvas.uniform(60, 72)
    name = canvas.text((UNITS / 2, middle), named.text(style.language), size, style.text, align="center", bold=True)
    canvas.element(named, "heading", (picture[0], picture[1], picture[2], middle + 50), [ink, name], tappable=False)
    canvas.text((MARGIN, middle + 110), price(canvas), 64, (226, 70, 40), bold=True)
    sold = words(canvas, f"已售 {canvas.integer(10, 999)}|包邮", f"{canvas.integer(10, 999)} sold|Free delivery")
    canvas.text((UNITS - MARGIN, middle + 110), sold, 42, style.secondary, align="right")
    canvas.rect((0, bar, UNITS, canvas.height), style.surface)
    x = MARGIN - 20
    if canvas.chance(0.6):
        assert favorite.icon is not None
        width = 230.0
        box = (x, bar + 10, x + width, canvas.height - 10)
        icon = canvas.icon(favorite.icon, (x + width / 2, bar + 66), 76, style.text)
        text = favorite.text(style.language)
        word = canvas.text(
            (x + width / 2, bar + 142), text, canvas.fit(text, 44, width - 10), style.text, align="center"
        )
        canvas.element(favorite, "button", box, [icon, word])
        x += width + 10
    pair = [label("button", "cart"), label("button", "buy")] if canvas.chance(0.75) else [label("button", "buy")]
    each = (UNITS - MARGIN + 20 - x) / len(pair)
    for index, what in enumerate(pair):
        box = (x + index * each + 8, bar + 25, x + (index + 1) * each - 8, canvas.height - 35)
        button(canvas, what, box, filled=what.key == "buy", size=54 * style.font_scale, icon=canvas.chance(0.4))


def loading(canvas: Canvas) -> PageState:
    """An app's title over a spinner: nothing else has come yet."""
    key = one_of(canvas, tuple(LOADING_APPS))
    app = label("app", key)
    title_bar(canvas, app)
    spinner(canvas, (UNITS / 2, canvas.height * canvas.uniform(0.4, 0.55)))
    return PageState(label("page", LOADING_APPS[key]), app, loading=True)
