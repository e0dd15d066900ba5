"""Fonts and icons of the generated screens: which half of the world uses which, and where they lie.

Fonts come from Debian packages, icons from npm packages; scripts/install_train_assets.sh brings both. What is missing
is replaced by stand-ins (see glyphs.py), which is enough to try the training program, not to train: `require_assets`
is asked before that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import platformdirs

from autoglm.errors import ConfigError
from autoglm.train.world.labels import Language
from autoglm.train.world.split import Split

INSTALLER = "scripts/install_train_assets.sh"
_SYSTEM = Path("/")

# Debian package of fonts -> licence of the fonts in it.
FONT_LICENCES = {
    "fonts-noto-cjk": "SIL OFL 1.1",
    "fonts-wqy-microhei": "Apache-2.0 or GPL-3+ with font exception",
    "fonts-wqy-zenhei": "GPL-2 with font embedding exception",
    "fonts-droid-fallback": "Apache-2.0",
    "fonts-arphic-uming": "Arphic Public License",
    "fonts-arphic-ukai": "Arphic Public License",
    "fonts-roboto-unhinted": "Apache-2.0",
    "fonts-lato": "SIL OFL 1.1",
    "fonts-dejavu-core": "Bitstream Vera licence",
    "fonts-cantarell": "SIL OFL 1.1",
    "fonts-liberation": "GPL-2 with font exception (1.x), SIL OFL 1.1 (2.x)",
    "fonts-open-sans": "Apache-2.0",
}


@dataclass(frozen=True)
class Face:
    """One font family: `regular` and `bold` are files below usr/share/fonts, `index` the face inside a collection.

    `weight` is how often it is drawn. latin=False: the file has no digits and letters, so a text with any is drawn
    in the split's first face.
    """

    name: str
    package: str
    regular: str
    bold: str
    index: int = 0
    weight: float = 1.0
    latin: bool = True


def _face(name: str, package: str, files: str, *, index: int = 0, weight: float = 1.0, latin: bool = True) -> Face:
    regular, _, bold = files.partition(" | ")
    return Face(name, package, regular, bold or regular, index, weight, latin)


_NOTO_SANS = "opentype/noto/NotoSansCJK-Regular.ttc | opentype/noto/NotoSansCJK-Bold.ttc"
_NOTO_SERIF = "opentype/noto/NotoSerifCJK-Regular.ttc | opentype/noto/NotoSerifCJK-Bold.ttc"
_ROBOTO = "truetype/roboto/unhinted/"
_LIBERATION = "truetype/liberation/Liberation"
# Held out as whole families: Zen Hei is drawn by other hands than Micro Hei (which is Droid's), Open Sans than Roboto.
FACES: dict[tuple[Language, Split], tuple[Face, ...]] = {
    ("zh", "train"): (
        _face("Noto Sans CJK SC", "fonts-noto-cjk", _NOTO_SANS, index=2, weight=4),
        _face("WenQuanYi Micro Hei", "fonts-wqy-microhei", "truetype/wqy/wqy-microhei.ttc", weight=2),
        _face(
            "Droid Sans Fallback",
            "fonts-droid-fallback",
            "truetype/droid/DroidSansFallbackFull.ttf",
            weight=2,
            latin=False,
        ),
        _face("Noto Serif CJK SC", "fonts-noto-cjk", _NOTO_SERIF, index=2, weight=1.5),
        _face("AR PL UMing CN", "fonts-arphic-uming", "truetype/arphic/uming.ttc", weight=0.4),
        _face("AR PL UKai CN", "fonts-arphic-ukai", "truetype/arphic/ukai.ttc", weight=0.4),
    ),
    ("zh", "test"): (_face("WenQuanYi Zen Hei", "fonts-wqy-zenhei", "truetype/wqy/wqy-zenhei.ttc"),),
    ("en", "train"): (
        _face(
            "Roboto",
            "fonts-roboto-unhinted",
            f"{_ROBOTO}RobotoTTF/Roboto-Regular.ttf | {_ROBOTO}RobotoTTF/Roboto-Bold.ttf",
            weight=4,
        ),
        _face(
            "Roboto Condensed",
            "fonts-roboto-unhinted",
            f"{_ROBOTO}RobotoCondensed-Regular.ttf | {_ROBOTO}RobotoCondensed-Bold.ttf",
        ),
        _face("Lato", "fonts-lato", "truetype/lato/Lato-Regular.ttf | truetype/lato/Lato-Bold.ttf", weight=2),
        _face(
            "DejaVu Sans", "fonts-dejavu-core", "truetype/dejavu/DejaVuSans.ttf | truetype/dejavu/DejaVuSans-Bold.ttf"
        ),
        _face(
            "Cantarell",
            "fonts-cantarell",
            "opentype/cantarell/Cantarell-Regular.otf | opentype/cantarell/Cantarell-Bold.otf",
        ),
        _face("Noto Sans CJK SC", "fonts-noto-cjk", _NOTO_SANS, index=2),
        _face(
            "Liberation Serif",
            "fonts-liberation",
            f"{_LIBERATION}Serif-Regular.ttf | {_LIBERATION}Serif-Bold.ttf",
            weight=0.5,
        ),
    ),
    ("en", "test"): (
        _face(
            "Open Sans",
            "fonts-open-sans",
            "truetype/open-sans/OpenSans-Regular.ttf | truetype/open-sans/OpenSans-Bold.ttf",
            weight=2,
        ),
        _face("Liberation Sans", "fonts-liberation", f"{_LIBERATION}Sans-Regular.ttf | {_LIBERATION}Sans-Bold.ttf"),
    ),
}


@dataclass(frozen=True)
class IconSet:
    """One npm package of SVG icons; `pattern` is where an icon's name becomes a file below node_modules."""

    name: str
    package: str
    version: str
    licence: str
    pattern: str


ICON_SETS: dict[str, IconSet] = {
    entry.name: entry
    for entry in (
        IconSet("lucide", "lucide-static", "1.62.0", "ISC", "lucide-static/icons/{}.svg"),
        IconSet("tabler", "@tabler/icons", "3.51.0", "MIT", "@tabler/icons/icons/outline/{}.svg"),
        IconSet("mdi", "@mdi/svg", "7.4.47", "Apache-2.0", "@mdi/svg/svg/{}.svg"),
        IconSet("bootstrap", "bootstrap-icons", "1.13.2", "MIT", "bootstrap-icons/icons/{}.svg"),
        # The last version under a common licence; later ones have one of their own.
        IconSet("remix", "remixicon", "4.6.0", "Apache-2.0", "remixicon/icons/{}.svg"),
        IconSet("phosphor", "@phosphor-icons/core", "2.1.1", "MIT", "@phosphor-icons/core/assets/regular/{}.svg"),
    )
}
SETS_OF: dict[Split, tuple[str, ...]] = {
    "train": ("lucide", "tabler", "mdi", "bootstrap", "remix"),
    "test": ("phosphor",),
}

# Lucide's name (the key used in labels.py) in each other set; "-": the set has nothing like it, Lucide's is drawn.
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
    ICONS[_stem] = {
        "lucide": _stem,
        "tabler": _tabler,
        "mdi": _mdi,
        "bootstrap": _bootstrap,
        "remix": _remix,
        "phosphor": _phosphor,
    }


def assets_dir() -> Path:
    """The folder of what the system does not hold: npm's node_modules, Debian packages unpacked without root."""
    return Path(platformdirs.user_cache_dir("autoglm", appauthor=False)) / "train-assets"


def font_file(name: str) -> Path | None:
    """The file of a face's `regular` or `bold`, None when it is not installed."""
    for root in (_SYSTEM, assets_dir() / "debian"):
        path = root / "usr/share/fonts" / name
        if path.is_file():
            return path
    return None


def icon_file(icon_set: str, stem: str) -> Path | None:
    """The SVG of an icon in a set (Lucide's where the set has none), None when the package is not installed."""
    name = ICONS[stem][icon_set]
    entry = ICON_SETS[icon_set if name != "-" else "lucide"]
    path = assets_dir() / "node_modules" / entry.pattern.format(name if name != "-" else stem)
    return path if path.is_file() else None


def missing_assets() -> tuple[str, ...]:
    """The packages of fonts and icons that are not installed, or not whole."""
    faces = [face for split_faces in FACES.values() for face in split_faces]
    missing = {face.package for face in faces if font_file(face.regular) is None or font_file(face.bold) is None}
    for name, entry in ICON_SETS.items():
        if any(icon_file(name, stem) is None for stem, names in ICONS.items() if names[name] != "-"):
            missing.add(entry.package)
    return tuple(sorted(missing))


def require_assets() -> None:
    """Raise ConfigError unless every font and icon is there: a model trained on stand-ins cannot read a phone."""
    missing = missing_assets()
    if missing:
        raise ConfigError(
            f"fonts or icons to draw screens with are not installed: {', '.join(missing)}. Mend: sh {INSTALLER}"
        )


def licence_table() -> str:
    """Fonts and icons as a Markdown table for the model card."""
    owners: dict[str, set[str]] = {}
    for (_, split), faces in FACES.items():
        for face in faces:
            owners.setdefault(face.package, set()).add(split)
    for split, sets in SETS_OF.items():
        for name in sets:
            owners.setdefault(f"{ICON_SETS[name].package} {ICON_SETS[name].version}", set()).add(split)
    licences = FONT_LICENCES | {f"{entry.package} {entry.version}": entry.licence for entry in ICON_SETS.values()}
    rows = ["| package | from | licence | seen in |", "| --- | --- | --- | --- |"]
    for package, licence in licences.items():
        source = "Debian" if package in FONT_LICENCES else "npm"
        rows.append(f"| {package} | {source} | {licence} | {', '.join(sorted(owners[package], reverse=True))} |")
    return "\n".join(rows)
