"""The roles of a run whose folder is on this machine, out of its configuration, for commands and for the forkserver.

Each is imported where it is needed, for a process beside the database never has torch in its memory.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from farflung.config import Config, RelaySection
from farflung.protocol.identity import Key

if TYPE_CHECKING:
    from farflung.learner.ranks import Ranks
    from farflung.relay import Relay
    from farflung.scorer import Scorer
    from farflung.trainer import Trainer
    from farflung.validator import Validator
    from farflung.worker import Worker


def trainer(url: str, config: Config, ranks: "Ranks | None" = None) -> "Trainer":
    """The trainer, or rank 0 of it."""
    from farflung.trainer import Trainer

    return Trainer(url, _granted(config, "trainer"), config, root=_root(config), ranks=ranks)


def validator(url: str, config: Config, name: str) -> "Validator":
    """A validator, with the key of its name that the run's folder has for it."""
    from farflung.validator import Validator

    about = (url, _granted(config, name), folder_of(config, name), config.validator)
    return Validator(*about, run=config.run.name, root=_root(config), name=name)


def scorer(url: str, config: Config, name: str) -> "Scorer":
    """A scorer, with the key of its name that the run's folder has for it."""
    from farflung.scorer import Scorer

    return Scorer(url, _granted(config, name), config, root=_root(config), name=name)


def relay(url: str, config: Config, name: str) -> "Relay":
    """A relay on any free port, with a key of its own in its folder."""
    from farflung.relay import Relay

    folder = folder_of(config, name)
    about = (url, Key.load_or_make(folder / "key"), folder, RelaySection())
    return Relay(*about, run=config.run.name, root=_root(config), name=name)


def worker(url: str, config: Config, name: str, attack: str = "") -> "Worker":
    """A worker with a key of its own in its folder, or an adversary that runs an attack of the gallery."""
    from farflung.worker import Worker

    folder = folder_of(config, name)
    about = (url, Key.load_or_make(folder / "key"), folder, config.worker)
    options = {"run": config.run.name, "root": _root(config), "name": name, "idle": config.idle}
    if not attack:
        return Worker(*about, **options)

    from farflung.redteam import GALLERY
    from farflung.redteam.adversary import Adversary
    from farflung.trust.profiles import load_profile
    from farflung.trust.record import TrustSettings

    settings = config.trust.model_dump()
    trust = TrustSettings(**{name: settings[name] for name in TrustSettings.__struct_fields__})
    judged_by = load_profile(config.model.profile)
    return Adversary(*about, attack=GALLERY[attack](), trust=trust, judged_by=judged_by, **options)


def folder_of(config: Config, name: str) -> Path:
    """Where a node of this name keeps what is its own."""
    return config.folder / "nodes" / name


def _granted(config: Config, name: str) -> Key:
    """The key that a role was granted to, of which the folder of the run has both halves."""
    return Key.load_or_make(config.folder / "keys" / name)


def _root(config: Config) -> bytes | None:
    """The root key of the run; elsewhere the first one met is believed."""
    from farflung.tasks.keyring import root_of

    return root_of(config.folder / "keys")
