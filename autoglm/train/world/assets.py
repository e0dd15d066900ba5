"""Fonts and icons of the generated screens: where they lie, which half of the world may use them, and their glyph masks.

Fonts come from Debian packages, icons from npm packages (scripts/install_train_assets.sh brings both, with
their licences). Nothing is read at import. Masks are drawn once for a (face, size, text) and kept.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import platformdirs
import resvg_py
from PIL import Image, ImageDraw, ImageFont

from autoglm.errors import ConfigError
from autoglm.train.world.labels import Language
from autoglm.train.world.split import Split

INSTALLER = "scripts/install_train_assets.sh"
ICON_MASTER_PX = 192


@dataclass(frozen=True)
class Face:
    """One font file (and the face inside a collection), with how often it is drawn."""

    name: str
    regular: str
    bold: str
    index: int = 0
    weight: float = 1.0
    latin: bool = True  # False: the file has no digits; a text with any is drawn in the split's first face


_NOTO = "/usr/share/fonts/opentype/noto/"
_TTF = "/usr/share/fonts/truetype/"
_ROBOTO = _TTF + "roboto/unhinted/"
# Held out as whole families: Zen Hei is drawn by other hands than Micro Hei (which is Droid's), Open Sans than Roboto.
FACES: dict[tuple[Language, Split], tuple[Face, ...]] = {
    ("zh", "train"): (
        Face("Noto Sans CJK SC", _NOTO + "NotoSansCJK-Regular.ttc", _NOTO + "NotoSansCJK-Bold.ttc", 2, 4.0),
        Face("WenQuanYi Micro Hei", _TTF + "wqy/wqy-microhei.ttc", _TTF + "wqy/wqy-microhei.ttc", 0, 2.0),
        Face("Droid Sans Fallback", _TTF + "droid/DroidSansFallbackFull.ttf", _TTF + "droid/DroidSansFallbackFull.ttf", 0, 2.0, False),
        Face("Noto Serif CJK SC", _NOTO + "NotoSerifCJK-Regular.ttc", _NOTO + "NotoSerifCJK-Bold.ttc", 2, 1.5),
        Face("AR PL UMing CN", _TTF + "arphic/uming.ttc", _TTF + "arphic/uming.ttc", 0, 0.4),
        Face("AR PL UKai CN", _TTF + "arphic/ukai.ttc", _TTF + "arphic/ukai.ttc", 0, 0.4),
    ),
    ("zh", "test"): (Face("WenQuanYi Zen Hei", _TTF + "wqy/wqy-zenhei.ttc", _TTF + "wqy/wqy-zenhei.ttc"),),
    ("en", "train"): (
        Face("Roboto", _ROBOTO + "RobotoTTF/Roboto-Regular.ttf", _ROBOTO + "RobotoTTF/Roboto-Bold.ttf", 0, 4.0),
        Face("Roboto Condensed", _ROBOTO + "RobotoCondensed-Regular.ttf", _ROBOTO + "RobotoCondensed-Bold.ttf"),
        Face("Lato", _TTF + "lato/Lato-Regular.ttf", _TTF + "lato/Lato-Bold.ttf", 0, 2.0),
        Face("DejaVu Sans", _TTF + "dejavu/DejaVuSans.ttf", _TTF + "dejavu/DejaVuSans-Bold.ttf"),
        Face(
            "Cantarell",
            "/usr/share/fonts/opentype/cantarell/Cantarell-Regular.otf",
            "/usr/share/fonts/opentype/cantarell/Cantarell-Bold.otf",
        ),
        Face("Noto Sans CJK SC", _NOTO + "NotoSansCJK-Regular.ttc", _NOTO + "NotoSansCJK-Bold.ttc", 2),
        Face("Liberation Serif", _TTF + "liberation/LiberationSerif-Regular.ttf", _TTF + "liberation/LiberationSerif-Bold.ttf", 0, 0.5),
    ),
    ("en", "test"): (
        Face("Open Sans", _TTF + "open-sans/OpenSans-Regular.ttf", _TTF + "open-sans/OpenSans-Bold.ttf", 0, 2.0),
        Face("Liberation Sans", _TTF + "liberation/LiberationSans-Regular.ttf", _TTF + "liberation/LiberationSans-Bold.ttf"),
    ),
}


@dataclass(frozen=True)
class IconSet:
    """One npm package of SVG icons; `pattern` is where an icon's name becomes a file."""

    name: str
    licence: str
    pattern: str


ICON_SETS: tuple[IconSet, ...] = (
    IconSet("lucide", "ISC", "lucide-static/icons/{}.svg"),
    IconSet("tabler", "MIT", "@tabler/icons/icons/outline/{}.svg"),
    IconSet("mdi", "Apache-2.0", "@mdi/svg/svg/{}.svg"),
    IconSet("bootstrap", "MIT", "bootstrap-icons/icons/{}.svg"),
    IconSet("remix", "Remix Icon License 1.0 (Apache-2.0 before 4.7)", "remixicon/icons/{}.svg"),
    IconSet("phosphor", "MIT", "@phosphor-icons/core/assets/regular/{}.svg"),
)
SETS_OF: dict[Split, tuple[str, ...]] = {"train": ("lucide", "tabler", "mdi", "bootstrap", "remix"), "test": ("phosphor",)}

# Lucide's name (the key used in labels.py) in each other set; "-" where a set has nothing like it and Lucide's is drawn.
ICONS: dict[str, dict[str, str]] = {}
for _row in """
    message-circle | message-circle | message-outline | chat | Communication/message-3-line | chat-circle
    scan-line | line-scan | line-scan | upc-scan | Device/qr-scan-line | scan
    shopping-bag | shopping-bag | shopping-outline | bag | Finance/shopping-bag-line | bag
    music-2 | music | music-note | music-note | Media/music-2-line | music-note
    utensils | tools-kitchen-2 | silverware-fork-knife | fork-knife | Food/restaurant-line | fork-knife
    eye | eye | eye-outline | eye | System/eye-line | eye
    map-pin | map-pin | map-marker-outline | geo-alt | Map/map-pin-line | map-pin
    camera | camera | camera-outline | camera | Media/camera-line | camera
    settings | settings | cog-outline | gear | System/settings-3-line | gear-six
    calendar | calendar | calendar | calendar | Business/calendar-line | calendar-blank
    clock | clock | clock-outline | clock | System/time-line | clock
    headphones | headphones | headphones | headphones | Media/headphone-line | headphones
    image | photo | image-outline | image | Media/image-line | image
    mail | mail | email-outline | envelope | Business/mail-line | envelope
    phone | phone | phone-outline | telephone | Device/phone-line | phone
    globe | world | web | globe | Business/global-line | globe
    cloud-sun | cloud | weather-partly-cloudy | cloud-sun | Weather/sun-cloudy-line | cloud-sun
    calculator | calculator | calculator | calculator | Business/calculator-line | calculator
    folder | folder | folder-outline | folder | Document/folder-line | folder
    notebook-pen | notebook | notebook-edit-outline | journal-text | Design/edit-2-line | notebook
    store | building-store | store-outline | shop | Buildings/store-2-line | storefront
    circle-play | player-play | play-circle-outline | play-circle | Media/play-circle-line | play-circle
    wallet | wallet | wallet-outline | wallet2 | Finance/wallet-line | wallet
    heart-pulse | heartbeat | heart-pulse | heart-pulse | Health & Medical/heart-pulse-line | heartbeat
    gamepad-2 | device-gamepad-2 | controller-classic-outline | controller | Device/gamepad-line | game-controller
    book-open | book | book-open-outline | book | Document/book-open-line | book-open
    newspaper | news | newspaper | newspaper | Document/newspaper-line | newspaper
    languages | language | translate | translate | Editor/translate-2 | translate
    wifi | wifi | wifi | wifi | Device/wifi-line | wifi-high
    bluetooth | bluetooth | bluetooth | bluetooth | Device/bluetooth-line | bluetooth
    sun | sun | white-balance-sunny | sun | Weather/sun-line | sun
    volume-2 | volume | volume-high | volume-up | Media/volume-up-line | speaker-high
    bell | bell | bell-outline | bell | Media/notification-3-line | bell
    battery-full | battery-4 | battery | battery-full | Device/battery-2-line | battery-full
    hard-drive | database | harddisk | hdd | Device/hard-drive-2-line | hard-drive
    hand | hand-stop | hand-back-right-outline | hand-index | - | hand
    shield | shield | shield-outline | shield | System/shield-line | shield
    locate | current-location | crosshairs | crosshair | Design/focus-3-line | crosshair
    type | typography | format-text | type | Editor/text | text-t
    user | user | account-outline | person | User & Faces/user-line | user
    info | info-circle | information-outline | info-circle | System/information-line | info
    refresh-cw | refresh | refresh | arrow-repeat | System/refresh-line | arrows-clockwise
    plane | plane | airplane | airplane | Map/plane-line | airplane
    radio-tower | access-point | radio-tower | broadcast | Device/base-station-line | broadcast
    wallpaper | wallpaper | wallpaper | palette | Design/palette-line | palette
    trash-2 | trash | delete-outline | trash3 | System/delete-bin-line | trash
    share-2 | share | share-variant-outline | share | System/share-line | share-network
    send | send | send-outline | send | Business/send-plane-line | paper-plane-tilt
    search | search | magnify | search | System/search-line | magnifying-glass
    shopping-cart | shopping-cart | cart-outline | cart | Finance/shopping-cart-line | shopping-cart
    star | star | star-outline | star | System/star-line | star
    footprints | shoe | shoe-sneaker | - | Map/footprint-line | sneaker
    shirt | shirt | tshirt-crew-outline | - | Others/t-shirt-line | t-shirt
    watch | device-watch | watch | watch | - | watch
    laptop | device-laptop | laptop | laptop | Device/macbook-line | laptop
    coffee | coffee | coffee-outline | cup-hot | Food/cup-line | coffee
    apple | apple | food-apple-outline | - | - | orange
    lamp-desk | lamp-2 | desk-lamp | lamp | - | lamp
    armchair | armchair | sofa-single-outline | - | Others/armchair-line | armchair
""".strip().splitlines():
    _stem, _tabler, _mdi, _bootstrap, _remix, _phosphor = (cell.strip() for cell in _row.split("|"))
    ICONS[_stem] = {"lucide": _stem, "tabler": _tabler, "mdi": _mdi, "bootstrap": _bootstrap, "remix": _remix, "phosphor": _phosphor}


def assets_dir() -> Path:
    """Where the installer puts what is not a Debian package."""
    return Path(platformdirs.user_cache_dir("autoglm", appauthor=False)) / "train-assets"


@lru_cache(maxsize=1024)
def _font(path: str, index: int, half_px: int) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(path, half_px / 2, index=index, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise ConfigError(f"font {Path(path).name} cannot be opened ({error}); run {INSTALLER}") from error


@dataclass(frozen=True)
class Glyphs:
    """A drawn text or icon: `mask` cropped to its ink, `left`/`top` from the pen origin (text: left end of the middle line)."""

    mask: Image.Image
    left: int
    top: int
    advance: float


@lru_cache(maxsize=30_000)
def text_glyphs(path: str, index: int, half_px: int, text: str) -> Glyphs:
    """The mask of `text` at half_px / 2 pixels; the origin is the left end on the line halfway up a capital letter."""
    font = _font(path, index, half_px)
    advance = font.getlength(text)
    pad = half_px
    baseline = pad + half_px
    canvas = Image.new("L", (int(advance) + 2 * pad, baseline + half_px))
    ImageDraw.Draw(canvas).text((pad, baseline), text, font=font, fill=255, anchor="ls")
    box = canvas.getbbox() or (pad, baseline, pad + 1, baseline + 1)
    # 0.36 em up the baseline is the middle of capitals and, within 0.02 em, of ideographs.
    return Glyphs(canvas.crop(box), box[0] - pad, round(box[1] - baseline + 0.18 * half_px), advance)


@lru_cache(maxsize=2048)
def _icon_master(icon_set: str, stem: str) -> Image.Image:
    names = ICONS[stem]
    used = icon_set if names[icon_set] != "-" else "lucide"
    pattern = next(entry.pattern for entry in ICON_SETS if entry.name == used)
    path = assets_dir() / "node_modules" / pattern.format(names[used])
    try:
        svg = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"icon {names[used]} of the set {used} is not installed; run {INSTALLER}") from error
    png = resvg_py.svg_to_bytes(svg_string=svg, width=ICON_MASTER_PX, height=ICON_MASTER_PX, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA").getchannel("A")


@lru_cache(maxsize=20_000)
def icon_glyphs(icon_set: str, stem: str, size_px: int) -> Glyphs:
    """The mask of an icon in a square of size_px; the origin is the square's upper left corner."""
    mask = _icon_master(icon_set, stem).resize((size_px, size_px), Image.Resampling.LANCZOS)
    box = mask.getbbox() or (0, 0, 1, 1)
    return Glyphs(mask.crop(box), box[0], box[1], float(size_px))
