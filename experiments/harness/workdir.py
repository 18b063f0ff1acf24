"""The folder of a run."""

from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from experiments.harness import setup
from lora_jax.data import default_cache_dir
from lora_jax.parallel import hosts
from lora_jax.training import records


def prepare(
    experiment: str, config: ConfigDict, workdir: Path, *, ignoring: Sequence[str] = ()
) -> None:
    """Keeps compiled programs for the next run, and claims the folder for this one, in which runs
    may differ in what is ignored."""
    setup.require_filled(config)
    settings = records.flat({"experiment": experiment, **config.to_dict()})
    settings = {name: value for name, value in settings.items() if name not in ignoring}
    hosts.require_agreement({**settings, "--workdir": str(workdir)})
    jax.config.update("jax_compilation_cache_dir", str(default_cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    hosts.on_first(lambda: records.claim(workdir, settings))
    hosts.require_shared(workdir / records.CONFIG)
