"""Settings of a run on one machine: the processes it starts, its faults, its prices and where its figures go."""

from farflung.config.section import Section, setting


class Cheat(Section):
    name: str = setting("mallory", "Name of the node.")
    attack: str = setting("unseeded", "Which adversary of the gallery it is.")


class SwarmSection(Section):
    workers: int = setting(4, "Honest workers.", ge=0, le=64)
    cheats: tuple[Cheat, ...] = setting((), "Dishonest workers.")
    kill: int = setting(0, "Further workers that are killed (-9) while they hold a lease.", ge=0, le=16)
    validators: int = setting(1, "Validators.", ge=0, le=8)
    relays: int = setting(0, "Relays.", ge=0, le=8)


class ChaosSection(Section):
    every_s: float = setting(25.0, "Seconds between faults.", gt=0)
    seed: int = setting(0, "Seed of the schedule of faults.")
    postgres: bool = setting(False, "Have a PostgreSQL server of the run's own, and kill it too, instead of SQLite.")


class PricesSection(Section):
    worker_usd_per_hour: float = setting(0.22, "One worker: a consumer card as rented in 2026.", ge=0)
    trainer_usd_per_hour: float = setting(2.0, "The trainer: one data-centre accelerator as rented in 2026.", ge=0)
    validator_usd_per_hour: float = setting(0.22, "One validator.", ge=0)
    coordinator_usd_per_hour: float = setting(0.05, "The coordinator with its scorer: a small virtual machine.", ge=0)
    accelerator_cores: float = setting(
        10.0,
        "Cores that cost as much as an accelerator: audit budget and overhead compare seconds of both by it.",
        gt=0,
        is_advanced=True,
    )

    def core_s(self, cpu_s: float, device_s: float) -> float:
        """What some work used, in seconds of a core: by the accelerator's seconds where it had one, else its own."""
        return device_s * self.accelerator_cores if device_s else cpu_s


class SinksSection(Section):
    wandb_project: str = setting("", "Project at Weights & Biases for step metrics; empty for none.")
    trackio_project: str = setting("", "Project in Trackio for step metrics; empty for none.")
