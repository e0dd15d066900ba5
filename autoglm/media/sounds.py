"""Sound file -> mono 16 kHz samples: wav, mp3, flac and ogg, limits checked before and while decoding.

libsndfile decodes, soxr resamples; both work on short blocks, so a clip costs its mono samples and no more, whatever
its rate and channels. Channels are averaged. libsndfile knows many more formats that nobody sends to a model; they are
not opened, by their first bytes and again by what libsndfile made of them.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from autoglm.errors import RequestError
from autoglm.media.limits import MediaLimits
from autoglm.media.log_mel import SAMPLE_RATE_HZ

if TYPE_CHECKING:
    from soundfile import SoundFile  # read with the first sound: a model without ears never needs it

MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 192_000
MAX_CHANNELS = 8
# What encoders add to fill their last frame; a clip this little too long is cut, not refused.
PADDING_S = 0.1
# Float files may overshoot 1 a little; samples in the range of 16-bit integers are a mistake of the writer.
MAX_PEAK = 8.0
_BLOCK_SAMPLES = 1 << 16
_FORMATS = frozenset({"WAV", "WAVEX", "FLAC", "OGG", "MP3"})
_SUBTYPES = re.compile(r"PCM_.*|FLOAT|DOUBLE|ULAW|ALAW|IMA_ADPCM|MS_ADPCM|VORBIS|OPUS|MPEG_LAYER_I+")
_UNREADABLE = (
    (b"\x1aE\xdf\xa3", "webm or Matroska"),
    (b"#!AMR", "amr"),
    (b"#!SILK", "silk"),
    (b"\x02#!SILK", "silk"),
    (b"FORM", "aiff"),
    (b"caff", "caf"),
    (b".snd", "au"),
    (b"0&\xb2u", "wma"),
    (b"ADIF", "aac"),
    (b"RF64", "rf64"),
    (b"wvpk", "wavpack"),
    (b"MAC ", "ape"),
    (b"MThd", "midi"),
    (b"FLV", "flv"),
)
_OGG_CODECS = (
    (b"\x01vorbis", "vorbis"),
    (b"OpusHead", "opus"),
    (b"\x7fFLAC", "flac"),
    (b"Speex", "speex"),
    (b"\x80theora", "theora"),
)


class Sound(Struct, frozen=True, weakref=True):
    """A decoded sound.

    samples       f32 [num_samples], mono, 16 kHz, about -1..1, read only
    format        wav, mp3, flac or ogg
    content_hash  SHA-256 of the samples
    """

    samples: NDArray[np.float32]
    format: str
    content_hash: bytes

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.samples.size / SAMPLE_RATE_HZ

    @property
    def nbytes(self) -> int:
        return self.samples.nbytes


class _Bytes(io.BytesIO):
    """Bytes for libsndfile, whose callbacks must not raise: a seek out of a broken file's bounds stops at its edge."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._size = len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self.tell(), self._size)[whence]
        return super().seek(min(max(base + offset, 0), self._size))


def decode_sound(data: bytes, *, limits: MediaLimits, param: str) -> Sound:
    """Decode one sound file.

    Raises RequestError for a container or codec that is not read (by name), a damaged file, one over `limits`, with
    more than 8 channels or a rate outside of 4 to 192 kHz.
    """
    if len(data) > limits.max_sound_bytes:
        raise RequestError(
            f"the sound has {len(data)} bytes, at most {limits.max_sound_bytes} are read; send a shorter clip",
            param=param,
            code="audio_too_large",
        )
    name = _readable_format(data, param)
    stream = _Bytes(data)
    import soundfile

    try:
        with soundfile.SoundFile(stream) as sound:
            # Read from front to back: soundfile seeks after each read of a seekable one, and some have no length.
            sound.seekable = lambda: False
            _check_header(sound, limits, param)
            samples = np.concatenate(list(_resampled(sound, limits, param)) or [np.empty(0, np.float32)])
            if name == "flac" and sound.frames < _UNKNOWN_FRAMES and sound.tell() < sound.frames:
                raise _damaged(param, "it ends before the length in its header")
    except (soundfile.SoundFileError, ValueError, OSError):
        raise _damaged(param, f"its {name} data cannot be decoded") from None
    if name == "mp3":
        _check_all_heard(data, stream.tell(), param)
    most = int(limits.max_sound_s * SAMPLE_RATE_HZ)
    if samples.size == 0:
        raise _damaged(param, "it has no samples")
    if samples.size > most:
        samples = samples[:most].copy()
    samples.setflags(write=False)
    return Sound(samples, name, hashlib.sha256(samples.data).digest())


# libsndfile's "I do not know": a stream whose writer never came back to fill in the length.
_UNKNOWN_FRAMES = 1 << 62


def _damaged(param: str, why: str) -> RequestError:
    return RequestError(f"the sound is damaged: {why}", param=param, code="invalid_audio")


def _unreadable(param: str, what: str) -> RequestError:
    return RequestError(
        f"the sound is {what}; send wav, mp3, flac or ogg (Vorbis or Opus)", param=param, code="unsupported_audio"
    )


def _too_long(param: str, limits: MediaLimits) -> RequestError:
    return RequestError(
        f"the sound is longer than {limits.max_sound_s:g} s; send a shorter clip", param=param, code="audio_too_long"
    )


def _readable_format(data: bytes, param: str) -> str:
    """The container by its first bytes. Raises RequestError naming one that is not read."""
    if data.startswith(b"RIFF") and data[8:12] == b"WAVE":
        return "wav"
    if data.startswith(b"fLaC"):
        return "flac"
    if data.startswith(b"OggS"):
        # The first packet, after the page's 27 bytes and its segment table, names the codec.
        first = data[28:64]
        codec = next((name for magic, name in _OGG_CODECS if magic in first), "an unknown codec")
        if codec not in ("vorbis", "opus", "flac"):
            raise _unreadable(param, f"ogg with {codec}")
        return "ogg"
    if data.startswith(b"ID3"):
        return "mp3"
    if len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0:
        # An ADTS header has MPEG's sync word with layer 0.
        if data[1] & 0x06 == 0:
            raise _unreadable(param, "aac")
        return "mp3"
    if data[4:8] == b"ftyp":
        raise _unreadable(param, "m4a or mp4")
    unknown = "of an unknown format" if data else "empty"
    raise _unreadable(param, next((name for magic, name in _UNREADABLE if data.startswith(magic)), unknown))


def _check_header(sound: SoundFile, limits: MediaLimits, param: str) -> None:
    if sound.format not in _FORMATS or not _SUBTYPES.fullmatch(sound.subtype):
        raise _unreadable(param, f"{sound.format} with {sound.subtype}".lower())
    if not 1 <= sound.channels <= MAX_CHANNELS:
        raise _unreadable(param, f"of {sound.channels} channels, at most {MAX_CHANNELS} are mixed")
    if not MIN_RATE_HZ <= sound.samplerate <= MAX_RATE_HZ:
        raise _unreadable(param, f"sampled at {sound.samplerate} Hz, readable are {MIN_RATE_HZ} to {MAX_RATE_HZ}")
    # An mp3's length is guessed from its first frame, so it is measured while decoding, as is an unknown one.
    is_exact = sound.format != "MP3" and sound.frames < _UNKNOWN_FRAMES
    if is_exact and sound.frames > _most_frames(sound, limits):
        raise _too_long(param, limits)


def _most_frames(sound: SoundFile, limits: MediaLimits) -> int:
    return int((limits.max_sound_s + PADDING_S) * sound.samplerate)


def _resampled(sound: SoundFile, limits: MediaLimits, param: str) -> Iterator[NDArray[np.float32]]:
    """Blocks of mono samples at 16 kHz. Raises RequestError as soon as there are too many."""
    resampler = None
    if sound.samplerate != SAMPLE_RATE_HZ:
        import soxr

        resampler = soxr.ResampleStream(sound.samplerate, SAMPLE_RATE_HZ, 1, dtype="float32")
    left = _most_frames(sound, limits)
    while True:
        block = sound.read(_BLOCK_SAMPLES // sound.channels, dtype="float32", always_2d=True)
        left -= len(block)
        if left < 0:
            raise _too_long(param, limits)
        # Written so that NaN fails too.
        if len(block) and not np.abs(block).max() <= MAX_PEAK:
            raise _damaged(param, f"samples must be numbers in -1..1, some are beyond {MAX_PEAK:g}")
        mono = np.ascontiguousarray(block.mean(axis=1, dtype=np.float32))
        yield mono if resampler is None else resampler.resample_chunk(mono, last=len(block) == 0)
        if len(block) == 0:
            return


def _check_all_heard(data: bytes, end: int, param: str) -> None:
    """Refuse an mp3 whose decoder stopped before its frames did.

    Without a count of frames in its first one (or with a wrong one) libsndfile believes a guess and ends there, which
    would cut a sentence short unseen. A few chance matches in a tag at the end do not count.
    """
    start = 0
    if data.startswith(b"ID3") and len(data) > 9:
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    first = data.find(b"\xff", start)
    sync = data[first : first + 2]
    if first >= 0 and len(sync) == 2 and data.count(sync, end) > 4:
        raise _damaged(param, "this mp3's header gives a shorter length than it has; save it anew or send wav")
