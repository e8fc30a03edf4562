"""The learner of a run, out of its configuration."""

import logging
import signal
from collections.abc import Callable

import torch

from farflung.config import Config
from farflung.learner.distributed import DistributedLearner
from farflung.learner.loss import Objective
from farflung.learner.optimise import Learner, Optimisation
from farflung.learner.policy import Policy
from farflung.learner.ranks import Ranks
from farflung.numerics.devices import pick, say
from farflung.numerics.train_precision import compute_dtype

log = logging.getLogger(__name__)


def learner_of(config: Config, ranks: Ranks) -> DistributedLearner:
    """This process's part of the learner."""
    learn, folder = config.learn, config.folder / "checkpoints"
    return DistributedLearner(
        lambda: build(config, ranks),
        folder,
        microbatch_tokens=learn.microbatch_tokens,
        keep=learn.keep_checkpoints,
        ranks=ranks,
    )


def follow(config: Config, ranks: Ranks, beside: Callable[[bytes], None]) -> None:
    """Train beside rank 0, which alone knows the coordinator, until it says that all is done.

    `beside` does what it says of what is not the learner's.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 is told too; it finishes its step, and needs us for that
    learner_of(config, ranks).follow(beside)


def build(config: Config, ranks: Ranks) -> Learner:
    """The learner as it begins, with the base model; the same on every rank."""
    learn, path = config.learn, config.model.path
    torch.manual_seed(config.run.seed)
    torch.set_num_threads(learn.threads)
    device = pick(learn.device, ranks.local_rank)
    say("learn", device, learn.device)
    dtype, why = compute_dtype(learn.precision, device)
    log.info("training in=%s because=%s rank=%d of=%d", dtype, why, ranks.rank, ranks.world)
    policy = Policy.from_pretrained(
        path,
        compute_dtype=dtype,
        device=device,
        is_checkpointed=learn.checkpointing,
        is_dithered=learn.rounding == "dithered",
        ranks=ranks,
        lora_rank=learn.lora_rank,
        lora_scale=learn.lora_scale,
    )
    reference = Policy.from_pretrained(path, compute_dtype=dtype, device=device, ranks=ranks) if learn.kl else None
    return Learner(policy, optimisation(config), reference=reference)


def optimisation(config: Config) -> Optimisation:
    """The learner's view of the configuration."""
    learn = config.learn
    return Optimisation(
        lr=learn.lr,
        beta1=learn.beta1,
        beta2=learn.beta2,
        weight_decay=learn.weight_decay,
        warmup_steps=learn.warmup_steps,
        max_grad_norm=learn.max_grad_norm,
        minibatches=learn.minibatches,
        importance_cap=learn.importance_cap,
        are_moments_on_host=learn.moments == "host",
        objective=Objective(
            kind=learn.loss,
            epsilon=learn.epsilon,
            epsilon_high=learn.epsilon_high,
            delta=learn.delta,
            normalise=learn.normalise,
            constant=float(config.generate.max_new_tokens),
            kl=learn.kl,
            entropy=learn.entropy,
        ),
    )
