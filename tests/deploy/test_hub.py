"""hf: and modelscope: names: which files are chosen, and how the clients' failures read. The clients are stand-ins."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from autoglm.deploy import hub, pull
from autoglm.errors import ConfigError, DownloadError

REPO = "someone/AutoGLM-Phone-9B-GGUF"
LISTING = [
    "README.md",
    "AutoGLM-Phone-9B-Q8_0.gguf",
    "AutoGLM-Phone-9B-Q4_K_M.gguf",
    "AutoGLM-Phone-9B-BF16-00001-of-00002.gguf",
    "AutoGLM-Phone-9B-BF16-00002-of-00002.gguf",
    "mmproj-AutoGLM-Phone-9B-BF16.gguf",
    "mmproj-AutoGLM-Phone-9B-F16.gguf",
]


class FakeHub:
    """Both clients' functions over a folder; remembers what was fetched."""

    def __init__(self, folder: Path, files: list[str], content: bytes = b"GGUF....") -> None:
        self.folder, self.files, self.content = folder, files, content
        self.fetched: list[tuple[str, str]] = []
        self.error: Exception | None = None

    def list_files(self, repository: str) -> list[str]:
        if self.error is not None:
            raise self.error
        return self.files

    def download(self, repository: str, file: str) -> str:
        self.fetched.append((repository, file))
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.content)
        return str(path)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """Installs stand-ins for huggingface_hub and modelscope with the signatures this package calls."""
    state = FakeHub(tmp_path, LISTING)
    hf = types.ModuleType("huggingface_hub")
    hf.HfApi = lambda: types.SimpleNamespace(list_repo_files=lambda repo_id: state.list_files(repo_id))  # type: ignore[attr-defined]
    hf.hf_hub_download = lambda repo_id, filename: state.download(repo_id, filename)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hf)

    def get_model_files(model_id: str, recursive: bool) -> list[dict[str, object]]:
        assert recursive
        return [{"Path": name, "Size": 1} for name in state.list_files(model_id)]

    api = types.ModuleType("modelscope.hub.api")
    api.HubApi = lambda: types.SimpleNamespace(get_model_files=get_model_files)  # type: ignore[attr-defined]
    download = types.ModuleType("modelscope.hub.file_download")
    download.model_file_download = lambda model_id, file_path: state.download(model_id, file_path)  # type: ignore[attr-defined]
    for name in ("modelscope", "modelscope.hub"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", api)
    monkeypatch.setitem(sys.modules, "modelscope.hub.file_download", download)
    return state


@pytest.mark.parametrize("kind", ["hf", "modelscope"])
def test_takes_q4_k_m_and_its_projector(fake: FakeHub, kind: str) -> None:
    model = pull.pull(f"{kind}:{REPO}")
    assert model.path.name == "AutoGLM-Phone-9B-Q4_K_M.gguf"
    assert model.mmproj is not None and model.mmproj.name == "mmproj-AutoGLM-Phone-9B-F16.gguf"
    assert {repository for repository, _ in fake.fetched} == {REPO}


@pytest.mark.parametrize("wanted", ["Q8_0", "q8_0", "AutoGLM-Phone-9B-Q8_0.gguf"])
def test_a_file_or_quantization_can_be_named(fake: FakeHub, wanted: str) -> None:
    assert pull.pull(f"hf:{REPO}:{wanted}").path.name == "AutoGLM-Phone-9B-Q8_0.gguf"


def test_a_quantization_is_a_word_of_its_own() -> None:
    files = ["m-BF16.gguf", "m-Q4_K_S.gguf"]
    assert hub.choose_model_file(REPO, ["m-BF16.gguf", "m-F16.gguf"], "F16") == "m-F16.gguf"
    assert hub.choose_model_file(REPO, files, None) == "m-Q4_K_S.gguf"
    with pytest.raises(DownloadError, match="holds no 'Q4_K'"):
        hub.choose_model_file(REPO, files, "Q4_K")


def test_files_in_folders_are_found() -> None:
    assert hub.choose_model_file(REPO, ["gguf/m.Q4_K_M.gguf"], None) == "gguf/m.Q4_K_M.gguf"
    assert hub.choose_model_file(REPO, ["gguf/m.Q4_K_M.gguf"], "m.Q4_K_M.gguf") == "gguf/m.Q4_K_M.gguf"


def test_an_only_file_of_unknown_kind_is_taken() -> None:
    assert hub.choose_model_file(REPO, ["model.gguf"], None) == "model.gguf"


def test_refusals_name_what_there_is() -> None:
    with pytest.raises(DownloadError, match=r"holds no \.gguf file"):
        hub.choose_model_file(REPO, ["model.safetensors", "mmproj-F16.gguf"], None)
    with pytest.raises(DownloadError, match="name one after a colon: a-IQ2_M.gguf, b-IQ1_S.gguf"):
        hub.choose_model_file(REPO, ["b-IQ1_S.gguf", "a-IQ2_M.gguf"], None)
    with pytest.raises(DownloadError, match="one part of a split model"):
        hub.choose_model_file(REPO, LISTING, "AutoGLM-Phone-9B-BF16-00001-of-00002.gguf")


@pytest.mark.parametrize("name", ["hf:", "hf:owner", "hf:a/b/c", "hf:a/b:c:d", "modelscope:../x:y", "hf:a b/c"])
def test_malformed_names_are_refused_before_any_request(fake: FakeHub, name: str) -> None:
    with pytest.raises(ConfigError, match="form hf:OWNER/REPO"):
        pull.pull(name)
    assert not fake.fetched


def test_a_client_failure_is_one_line(fake: FakeHub) -> None:
    fake.error = OSError("404 Client Error\nand a page of detail")
    with pytest.raises(DownloadError, match="OSError: 404 Client Error; mend") as caught:
        pull.pull(f"hf:{REPO}")
    assert "\n" not in str(caught.value)


def test_what_is_no_gguf_is_refused(fake: FakeHub) -> None:
    fake.content = b"version https://git-lfs"
    with pytest.raises(DownloadError, match="not a GGUF file"):
        pull.pull(f"hf:{REPO}")


@pytest.mark.parametrize(("kind", "package"), [("hf", "huggingface_hub"), ("modelscope", "modelscope")])
def test_a_missing_client_names_the_mend(monkeypatch: pytest.MonkeyPatch, kind: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", None)
    with pytest.raises(ConfigError, match=f"-m pip install {package}"):
        pull.pull(f"{kind}:{REPO}")


def test_the_real_hugging_face_client_has_these_functions() -> None:
    """Guards the stand-in above: the names and parameters it imitates exist."""
    client = pytest.importorskip("huggingface_hub")
    import inspect

    inspect.signature(client.HfApi().list_repo_files).bind(REPO)
    inspect.signature(client.hf_hub_download).bind(REPO, "file.gguf")
