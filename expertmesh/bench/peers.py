"""Other engines, to measure side by side with this one: which are set up, what they read, how they are started.

Each has an environment of its own, a folder that `benchmarks/peers/setup` makes; a peer.json in it says that it is
whole. transformers may also be installed beside this engine.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from expertmesh.bench import driver
from expertmesh.bench.plain import write_plain_copy
from expertmesh.config import ModelConfig
from expertmesh.engine.checkpoint import Checkpoint
from expertmesh.errors import InputError

NAMES = ("llama.cpp", "vllm", "transformers")
SETUP = "benchmarks/peers/setup"
FOLDER = Path(os.path.expanduser("~"), ".cache", "expertmesh", "peers")
GGUF = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}  # llama.cpp's names


@dataclass(frozen=True)
class Work:
    """What is measured in every process: threads, repeats, and a file with one prompt a line."""

    threads: int
    repeats: int
    prompts: Path

    def words(self) -> list[str]:
        return [str(self.threads), str(self.repeats), str(self.prompts)]


@dataclass(frozen=True)
class Source:
    """A checkpoint as peers can read it: in `dtype`, with every field of its config.json that they need.

    scratch: an empty folder, for a copy that lasts as long as the measurement.
    """

    checkpoint: Checkpoint
    dtype: str
    scratch: Path

    @cached_property
    def folder(self) -> Path:
        """The weights themselves where peers can read them, else without what they are quantised in, which peers cannot
        compute with on a CPU: they get the same weights in the type that this engine computes in too."""
        config = self.checkpoint.config
        if config.fp8_block or config.int8_rows or config.int4_group:
            write_plain_copy(self.checkpoint, self.scratch, self.dtype)
        else:
            for file in self._files():
                (self.scratch / file.name).symlink_to(file.resolve())
        given = self.scratch / "config.json"
        fields = json.loads((given if given.exists() else self._config).read_text(encoding="utf-8"))
        given.unlink(missing_ok=True)
        given.write_text(json.dumps(fields | routing(self.checkpoint.config)), encoding="utf-8")
        return self.scratch

    @property
    def name(self) -> str:
        """Another one for other weights, whatever the folder is called."""
        said = [str(self.checkpoint.folder.resolve()), self.dtype]
        for file in (self._config, *self._files()):
            stat = file.stat()
            said.append(f"{file.name} {stat.st_size} {stat.st_mtime_ns}")
        digest = hashlib.sha256("\n".join(said).encode()).hexdigest()[:12]
        return f"{self.checkpoint.folder.resolve().name}-{digest}"

    @property
    def _config(self) -> Path:
        return self.checkpoint.folder / "config.json"

    def _files(self) -> list[Path]:
        """With the weights, and where they are."""
        folder = self.checkpoint.folder
        return sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")])


def routing(config: ModelConfig) -> dict[str, str]:
    """How experts are chosen: readers differ in what they take for granted where a config.json does not say it."""
    return {"scoring_func": config.scoring_func, "topk_method": config.topk_method}


@dataclass(frozen=True)
class Peer:
    """An engine in Python, which runs the driver. folder: its environment."""

    name: str
    version: str
    python: Path
    environment: dict[str, str] = field(default_factory=dict)

    def precision(self, source: Source, int8: bool) -> str:
        """What it computes in, asked for INT8 or not: these have none for a checkpoint that is not INT8 itself."""
        return source.dtype

    def prepare(self, source: Source, precision: str) -> Path:
        """The checkpoint in the peer's own format."""
        return source.folder

    def command(self, checkpoint: Path, precision: str, work: Work) -> list[str]:
        # -P: modules beside the driver are not to hide others of the same name.
        script = str(Path(driver.__file__).resolve())
        threads, *rest = work.words()
        return [str(self.python), "-P", script, self.name, str(checkpoint), precision, threads, *rest]


@dataclass(frozen=True)
class LlamaCpp(Peer):
    """llama.cpp with its own program, on GGUF files that are written once."""

    @property
    def folder(self) -> Path:
        return self.python.parents[1]

    def precision(self, source: Source, int8: bool) -> str:
        return "int8" if int8 else source.dtype

    def prepare(self, source: Source, precision: str) -> Path:
        kind = GGUF[precision]
        target = self.folder / "gguf" / f"{source.name}-{kind}.gguf"
        if target.exists():
            return target
        target.parent.mkdir(exist_ok=True)
        partial = target.with_suffix(".partial")
        script, tree = self.folder / "bin" / "convert.py", self.folder / "source" / "llama.cpp"
        words = [self.python, script, tree, source.folder, "--outtype", kind, "--outfile", partial]
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
        if done.returncode:
            partial.unlink(missing_ok=True)
            raise InputError(f"llama.cpp cannot convert the checkpoint:\n{done.stderr.strip()[-2000:]}")
        os.replace(partial, target)
        return target

    def command(self, checkpoint: Path, precision: str, work: Work) -> list[str]:
        return [str(self.folder / "bin" / "measure"), str(checkpoint), *work.words()]


# In the driver's process: vLLM's own processes would only add time between steps. Eager, all threads on all cores.
VLLM = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}


def find(name: str, folder: Path, threads: int) -> Peer | None:
    """The peer of this name, or None where it is not set up. `folder` has the environments."""
    own = folder / name
    done = own / "peer.json"
    if not done.exists():
        if name == "transformers" and importlib.util.find_spec(name) is not None:
            return Peer(name, "", Path(sys.executable))
        return None
    version = json.loads(done.read_text(encoding="utf-8"))["version"]
    python = own / "bin" / "python"
    if name == "llama.cpp":
        return LlamaCpp(name, version, python)
    return Peer(name, version, python, VLLM | {"OMP_NUM_THREADS": str(threads)} if name == "vllm" else {})


def choose(names: Sequence[str] | None, folder: Path, threads: int) -> list[Peer]:
    """Those that are asked for, in the order in which they are; None takes all that are set up."""
    found = [find(name, folder, threads) for name in (NAMES if names is None else names)]
    if names is None:
        return [peer for peer in found if peer is not None]
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise InputError(f"--against {unknown[0]!r} is not one of {', '.join(NAMES)}")
    missing = [name for name, peer in zip(names, found, strict=True) if peer is None]
    if missing:
        into = "" if folder == FOLDER else f" --into {folder}"
        raise InputError(f"not set up: {', '.join(missing)}; run `{SETUP} {' '.join(missing)}{into}`")
    return [peer for peer in found if peer is not None]
