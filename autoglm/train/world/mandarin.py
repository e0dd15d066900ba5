"""Chinese text to pinyin, as it sounds: what every Mandarin engine here is given.

espeak-ng 1.51 (Debian 12) reads Chinese characters through pinyin spelled as English letters: heard
and measured, nobody could follow it. Given pinyin in its own voice for it, it speaks Mandarin.
"""

from __future__ import annotations

from functools import cache

from pypinyin import Style, lazy_pinyin, load_phrases_dict

# Words of this world that pypinyin's dictionary does not hold and whose characters have two readings.
_READINGS = {"长按": "cháng àn", "重试": "chóng shì"}


def pinyin(text: str) -> list[str]:
    """The syllables of a Chinese text with tone digits ('wei1', 'xin4'; 5 is the neutral tone).

    What is not Chinese is left out. Tones change before their neighbour as they do in speech: 不, 一
    and the first of two third tones. Source: Chao, A Grammar of Spoken Chinese (1968), 1.3.
    """
    _load_readings()
    syllables = lazy_pinyin(text, style=Style.TONE3, neutral_tone_with_five=True, tone_sandhi=True, errors="ignore")
    characters = [character for character in text if "\u4e00" <= character <= "\u9fff"]
    if len(characters) != len(syllables):
        return syllables
    return [_tone_of_one(characters, syllables, index) for index in range(len(syllables))]


def _tone_of_one(characters: list[str], syllables: list[str], index: int) -> str:
    """一: neutral between a doubled verb (等一等), second tone before a fourth, fourth before others, else first."""
    if characters[index] != "一" or index + 1 == len(characters):
        return syllables[index]
    if index > 0 and characters[index - 1] == characters[index + 1]:
        return "yi5"
    return "yi2" if syllables[index + 1][-1] in "45" else "yi4"


@cache
def _load_readings() -> None:
    load_phrases_dict({word: [[part] for part in reading.split()] for word, reading in _READINGS.items()})
