"""Where the bundled recall model lies."""

from importlib import metadata
from pathlib import Path

_SHARE = "share/tangram/models/recall"


def recall_model_path() -> Path:
    """The folder of the recall model, as vLLM and transformers load it.

    A checkout's `models/recall` (an editable install, or its `src` on the path) goes before an
    installed copy, so that a model trained there is the one in use.

    Raises:
        FileNotFoundError: neither place holds a model; the message names both.
    """
    package = Path(__file__).resolve().parent
    checkout = package.parents[1] / "models" / "recall"
    if package.parent.name == "src" and _holds_model(checkout):
        return checkout
    installed = _installed_places(package)
    for place in installed:
        if _holds_model(place):
            return place
    looked = ", ".join(str(place) for place in installed) or f"{_SHARE} of an installed tangram-kv"
    raise FileNotFoundError(
        "the recall model is missing: expected config.json and model.safetensors in the checkout's "
        f"{checkout} or installed with the wheel in {looked}; reinstall tangram-kv, or give a model"
    )


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def _installed_places(package: Path) -> list[Path]:
    """Folders that may hold the wheel's data files, the likeliest first."""
    # `pip install --target DIR` puts data files into DIR/share, yet records them as if DIR lay
    # two folders deeper.
    places = [package.parent / _SHARE]
    try:
        files = metadata.files("tangram-kv") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "config.json" and file.parent.as_posix().endswith(_SHARE):
            places.insert(0, Path(str(file.locate())).resolve().parent)
    return places
