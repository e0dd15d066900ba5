"""Everything that can be named on a screen: apps, settings, buttons, people, goods and messages, in two languages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Language = Literal["zh", "en"]
LANGUAGES: tuple[Language, ...] = ("zh", "en")
Kind = Literal["app", "setting", "button", "contact", "product", "message", "page"]


@dataclass(frozen=True)
class Label:
    """One nameable thing.

    `icon` is the stem of the icon drawn for it, a key of `assets.ICONS` (None: it is only ever text).
    """

    key: str
    kind: Kind
    zh: str
    en: str
    icon: str | None = None

    def text(self, language: Language) -> str:
        """The words shown on a screen, and spoken in a command, in `language`."""
        return self.zh if language == "zh" else self.en


def _table(kind: Kind, rows: str) -> tuple[Label, ...]:
    labels = []
    for row in rows.strip().splitlines():
        key, zh, en, *icon = (cell.strip() for cell in row.split("|"))
        labels.append(Label(key, kind, zh, en, icon[0] if icon else None))
    return tuple(labels)


APPS = _table(
    "app",
    """
    wechat | 微信 | WeChat | message-circle
    alipay | 支付宝 | Alipay | scan-line
    taobao | 淘宝 | Taobao | shopping-bag
    douyin | 抖音 | Douyin | music-2
    meituan | 美团 | Meituan | utensils
    weibo | 微博 | Weibo | eye
    maps | 地图 | Maps | map-pin
    camera | 相机 | Camera | camera
    settings | 设置 | Settings | settings
    calendar | 日历 | Calendar | calendar
    clock | 时钟 | Clock | clock
    music | 音乐 | Music | headphones
    photos | 相册 | Photos | image
    mail | 邮件 | Mail | mail
    phone | 电话 | Phone | phone
    browser | 浏览器 | Browser | globe
    weather | 天气 | Weather | cloud-sun
    calculator | 计算器 | Calculator | calculator
    files | 文件 | Files | folder
    notes | 笔记 | Notes | notebook-pen
    store | 商店 | Store | store
    video | 视频 | Video | circle-play
    wallet | 钱包 | Wallet | wallet
    health | 健康 | Health | heart-pulse
    games | 游戏 | Games | gamepad-2
    books | 阅读 | Books | book-open
    news | 新闻 | News | newspaper
    translate | 翻译 | Translate | languages
    """,
)

SETTINGS = _table(
    "setting",
    """
    wifi | 无线网络 | Wi-Fi | wifi
    bluetooth | 蓝牙 | Bluetooth | bluetooth
    display | 显示 | Display | sun
    sound | 声音 | Sound | volume-2
    notifications | 通知 | Notifications | bell
    battery | 电池 | Battery | battery-full
    storage | 存储 | Storage | hard-drive
    privacy | 隐私 | Privacy | hand
    security | 安全 | Security | shield
    location | 定位 | Location | locate
    language | 语言 | Language | type
    accounts | 账号 | Accounts | user
    about | 关于手机 | About phone | info
    update | 系统更新 | Update | refresh-cw
    airplane | 飞行模式 | Airplane mode | plane
    hotspot | 热点 | Hotspot | radio-tower
    wallpaper | 壁纸 | Wallpaper | wallpaper
    """,
)

BUTTONS = _table(
    "button",
    """
    ok | 确定 | OK
    cancel | 取消 | Cancel
    allow | 允许 | Allow
    deny | 拒绝 | Deny
    delete | 删除 | Delete | trash-2
    save | 保存 | Save
    share | 分享 | Share | share-2
    skip | 跳过 | Skip
    retry | 重试 | Retry
    login | 登录 | Log in
    send | 发送 | Send | send
    search | 搜索 | Search | search
    buy | 购买 | Buy now
    cart | 加入购物车 | Add to cart | shopping-cart
    favorite | 收藏 | Favorite | star
    """,
)

CONTACTS = _table(
    "contact",
    """
    ming | 小明 | Alice
    hong | 小红 | Bob
    mom | 妈妈 | Mom
    dad | 爸爸 | Dad
    teacher | 王老师 | Emma
    boss | 李经理 | David
    doctor | 张医生 | Grace
    classmate | 老同学 | Henry
    """,
)

PRODUCTS = _table(
    "product",
    """
    shoes | 运动鞋 | Shoes | footprints
    shirt | 衬衫 | Shirt | shirt
    watch | 手表 | Watch | watch
    laptop | 电脑 | Laptop | laptop
    coffee | 咖啡 | Coffee | coffee
    apple | 苹果 | Apples | apple
    lamp | 台灯 | Lamp | lamp-desk
    chair | 椅子 | Chair | armchair
    """,
)

MESSAGES = _table(
    "message",
    """
    hello | 你好 | Hello
    thanks | 谢谢 | Thank you
    later | 晚点见 | See you later
    coming | 我马上到 | On my way
    home | 回家吃饭 | Dinner at home
    happy | 生日快乐 | Happy birthday
    busy | 我在开会 | In a meeting
    yes | 好的 | Sounds good
    """,
)

PAGES = _table(
    "page",
    """
    launcher | 桌面 | home screen
    settings_list | 设置列表 | settings list
    dialog | 对话框 | dialog
    search_page | 搜索页 | search page
    chat_list | 聊天列表 | chat list
    chat | 聊天页 | chat page
    shop | 商品页 | shop page
    """,
)

LABELS: tuple[Label, ...] = APPS + SETTINGS + BUTTONS + CONTACTS + PRODUCTS + MESSAGES + PAGES
BY_KEY: dict[tuple[Kind, str], Label] = {(label.kind, label.key): label for label in LABELS}
# Things with a box on a screen: what the eyes' own lesson tells apart, one class a label in both languages.
VISIBLE: tuple[Label, ...] = APPS + SETTINGS + BUTTONS + CONTACTS + PRODUCTS + MESSAGES
VISIBLE_CLASS: dict[tuple[Kind, str], int] = {
    (label.kind, label.key): index + 1 for index, label in enumerate(VISIBLE)
}  # 0: background
