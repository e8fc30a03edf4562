"""Memory of the learner on one device of several: which model trains on which machines, predicted by fake tensors.

    python bench/memory.py [--quick]

The real policy, sharding, adapters and optimizer run on tensors that have a shape and no values, in a process group
that sends nothing; storages are counted as they come and go, in decimal GB. Attention keeps what a flash kernel keeps.
Activations are checkpointed, weights bfloat16 as published over float32 masters. Of two steps the second is counted,
when moments and gradients are there. `peak_gb` is that and, but for `alone`, the tripwire's share of a second model in
bfloat16, idle at that time; `fits_gb` is the device's memory less 8 % for what the allocator and the driver take.
Nothing of this was measured on a GPU.
Prints one JSON object as its last line: `rows` = list of {`model`, `ranks`, `tokens`, `mode`, `peak_gb`, `fits_gb`,
`machine`}, and `load` = what a rank of two takes of host memory to load a real file: {`share_gb`, `host_gb`, `ratio`}.
`--quick` counts the smallest of them and loads a smaller file; the full command is `python bench/memory.py`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from real_models import MODELS
from transformers import AutoConfig, AutoModelForCausalLM

LORA_RANK = 16
USABLE = 0.92
"""Of a device's memory, after the driver and what the allocator cannot use. Devices are sold by 2^30 bytes."""


class Case(NamedTuple):
    """One run: how it trains and on what."""

    model: str
    ranks: int
    device_gb: int
    tokens: int
    mode: str
    """`all` weights or `lora`; `host` where AdamW's moments live in host memory, `alone` where there is no tripwire."""

    @property
    def machine(self) -> str:
        return f"{self.ranks} x {self.device_gb} GB"


CASES = [
    Case("Qwen2.5-1.5B", 1, 24, 8192, "all host"),
    Case("Qwen2.5-7B", 1, 24, 8192, "lora alone"),
    Case("Qwen2.5-7B", 1, 48, 8192, "lora"),
    Case("Qwen2.5-32B", 8, 80, 16_384, "lora"),
    Case("Qwen2.5-7B", 2, 80, 8192, "all host"),
    Case("Qwen2.5-7B", 4, 80, 8192, "all"),
    Case("Qwen2.5-14B", 4, 80, 8192, "all host"),
    Case("Qwen2.5-14B", 8, 80, 16_384, "all"),
    Case("Qwen2.5-32B", 8, 80, 8192, "all host"),
    Case("Qwen2.5-32B", 8, 80, 16_384, "all host"),
    Case("Llama-3.3-70B", 16, 80, 8192, "all host"),
]
QUICK = [CASES[0], CASES[8]]


# --- one case, in a process of its own -------------------------------------------------------------------------------


class Live:
    """Bytes of all storages that are alive on the device, and the most that there were."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.known: dict[int, tuple[int, str]] = {}
        self.at_peak: dict[int, tuple[int, str]] = {}

    def see(self, tensor: Any) -> None:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            weakref.finalize(storage, self._gone, key)
        self.now += size - self.known.get(key, (0, ""))[0]
        self.known[key] = size, f"{tuple(tensor.shape)} {tensor.dtype}"
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self.known)

    def away(self, tensor: Any) -> None:
        """Count it as being in host memory."""
        self._gone(tensor.untyped_storage()._cdata)

    def _gone(self, key: int) -> None:
        self.now -= self.known.pop(key, (0, ""))[0]

    def largest(self) -> str:
        sums: Counter[str] = Counter()
        for size, what in self.at_peak.values():
            sums[what] += size
        return ", ".join(f"{what} {size / 1e9:.1f}" for what, size in sums.most_common(6))


def counting(live: Live) -> Any:
    """A mode in which every tensor that is made is seen."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for one in tree_leaves(out):
                if isinstance(one, torch.Tensor):
                    live.see(one)
            return out

    return Counting()


class Flash(torch.autograd.Function):
    """Keeps what flash attention keeps: queries, keys, values, the output and a sum a row."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(one) for one in ctx.saved_tensors[:3])


def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (one.bfloat16() for one in (query, key, value))
    return Flash.apply(query, key, value).transpose(1, 2).contiguous(), None


def config_of(name: str, **instead: Any) -> Any:
    return AutoConfig.for_model(**MODELS[name] | instead)


def count(case: Case) -> dict[str, Any]:
    """The most bytes that one rank holds on its device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    live = Live()
    if case.ranks > 1:
        join_nobody(case.ranks)
    with FakeTensorMode(allow_non_fake_inputs=True):
        learner = learner_of(case, live)
        for parameter in learner.policy.model.parameters():
            live.see(parameter)
        for _ in range(2):
            live.peak = live.now
            take_step(learner, case.tokens, live)
    peak = live.peak + (0 if "alone" in case.mode else tripwire_bytes(case))
    sys.stderr.write(f"{case.model} on {case.machine}: {live.largest()}\n")
    return {
        "model": case.model,
        "ranks": case.ranks,
        "tokens": case.tokens,
        "mode": case.mode,
        "peak_gb": round(peak / 1e9, 1),
        "fits_gb": round(case.device_gb * 2**30 / 1e9 * USABLE, 1),
        "machine": case.machine,
    }


def join_nobody(ranks: int) -> None:
    """A process group whose other ranks are not there."""
    import torch.distributed as dist
    import torch.distributed._tools.fake_collectives  # noqa: F401 - gives collectives a meaning without values
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from farflung.learner import ranks as learner_ranks

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh = init_device_mesh("cpu", (ranks,))  # of values, so before there are none
    learner_ranks.init_device_mesh = lambda *_: mesh


def learner_of(case: Case, live: Live) -> Any:
    """The real learner, of a model without values."""
    from transformers import AttentionInterface

    from farflung.learner import moments, policy
    from farflung.learner.forward import Kind
    from farflung.learner.optimise import Learner, Optimisation
    from farflung.learner.ranks import Ranks
    from farflung.numerics import devices
    from farflung.numerics.making import without_weights

    devices._OF_CPU = devices._OF_ACCELERATOR  # sizes of blocks as on what is predicted
    AttentionInterface.register("counted", attend)
    model = without_weights(config_of(case.model), torch.float32)
    model.config._attn_implementation = "counted"
    model.float = lambda: model  # it is, and tensors without values cannot be swapped
    policy.find_kind = lambda *_, **__: Kind(has_linear_head=True, can_share=True)  # no trial without values
    is_lora = "lora" in case.mode
    made = policy.Policy(
        model,
        compute_dtype=torch.bfloat16,
        is_checkpointed=True,
        is_dithered=True,
        ranks=Ranks(0, case.ranks),
        lora_rank=LORA_RANK if is_lora else 0,
    )
    watch(live, moments)
    for module in model.modules():
        if hasattr(module, "is_held"):
            module.is_held = False  # as on an accelerator
    return Learner(made, Optimisation(are_moments_on_host="host" in case.mode))


def watch(live: Live, moments: Any) -> None:
    """See storages that are resized, and moments that come from and go to host memory: here all is on one device."""
    resize, bring = torch.UntypedStorage.resize_, moments.HostAdamW._bring

    def resized(storage: Any, size: int) -> None:
        resize(storage, size)
        if storage._cdata in live.known:
            before, what = live.known[storage._cdata]
            live.now += size - before
            live.known[storage._cdata] = size, what
            live.peak = max(live.peak, live.now)

    def brought(optimizer: Any, parameter: torch.Tensor) -> None:
        bring(optimizer, parameter)
        for name in ("exp_avg", "exp_avg_sq"):
            if name in optimizer.state[parameter]:
                live.see(optimizer.state[parameter][name])

    def sent(moment: torch.Tensor) -> torch.Tensor:
        live.away(moment)
        return moment

    torch.UntypedStorage.resize_ = resized
    moments.HostAdamW._bring, moments._to_host = brought, sent


def take_step(learner: Any, tokens: int, live: Live) -> None:
    """One pass over a row of so many trained tokens, its gradient, and the update."""
    from farflung.learner.forward import Asked, logp_entropy_N
    from farflung.numerics.packing import PackedRows

    policy, ids_RW = learner.policy, torch.zeros(1, tokens, dtype=torch.long)
    with counting(live):
        every_N = torch.arange(tokens)
        rows = PackedRows(ids_RW, ids_RW, ids_RW, ids_RW, every_N, is_plain=True)
        asked = Asked(every_N, ids_RW[0], torch.ones(tokens), is_entropy_trained=False)
        logp_N, _ = logp_entropy_N(policy.model, rows, policy._kind, policy._autocast, asked)
        logp_N.mean().backward()
        del logp_N, _
        parameters = learner.optimizer.param_groups[0]["params"]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)


def tripwire_bytes(case: Case) -> int:
    """A second model in bfloat16, a share of it on each rank, idle while the learner is at its peak."""
    from farflung.numerics.making import without_weights

    with torch.device("meta"):
        model = without_weights(config_of(case.model), torch.bfloat16)
    return sum(parameter.nbytes for parameter in model.parameters()) // case.ranks


# --- host memory at load ---------------------------------------------------------------------------------------------


def load(layers: int) -> dict[str, float]:
    """Two ranks load a real file; host memory of the one that takes more, against its share in float32."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of("Qwen2.5-1.5B", num_hidden_layers=layers, vocab_size=20_000)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).bfloat16()
        share = sum(parameter.numel() for parameter in model.parameters()) * 4 / 2
        model.save_pretrained(folder)
        del model
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", __file__, "--loads", folder]
        said = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=True)
    host = max(json.loads(line) for line in said.stdout.decode().splitlines() if line.strip().isdigit())
    return {"share_gb": round(share / 1e9, 3), "host_gb": round(host / 1e9, 3), "ratio": round(host / share, 3)}


def loads(folder: str) -> None:
    """As one of the ranks: print the bytes that loading took at most, until the weights are there.

    Pages of the mapped file are left out. The pass through the model that follows is the device's affair.
    """
    from farflung.learner import policy
    from farflung.learner.ranks import join, leave

    ranks, has_loaded, seen, find_kind = join(), threading.Event(), list[int](), policy.find_kind
    small = config_of("Qwen2.5-1.5B", num_hidden_layers=1, hidden_size=96)
    policy.Policy(AutoModelForCausalLM.from_config(small), ranks=ranks)  # imports what takes memory of its own

    def watch() -> None:
        while not has_loaded.wait(0.002):
            seen.append(own_bytes())

    def found(*given: Any, **named: Any) -> Any:
        has_loaded.set()
        watching.join()
        return find_kind(*given, **named)

    policy.find_kind, before, watching = found, own_bytes(), threading.Thread(target=watch)
    watching.start()
    policy.Policy.from_pretrained(folder, compute_dtype=torch.bfloat16, is_dithered=True, ranks=ranks)
    sys.stdout.write(f"{max(seen) - before}\n")
    sys.stdout.flush()
    leave(ranks)


def own_bytes() -> int:
    """Memory that is this process's alone: what is mapped from a file the machine takes back when it likes."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("RssAnon"))) * 1024


# --- all -------------------------------------------------------------------------------------------------------------


def row(case: Case) -> dict[str, Any]:
    """One case, in a process of its own: what is counted as alive is all that a process has."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout.decode().splitlines()[-1])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--loads", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        sys.stdout.write(json.dumps(count(Case(*json.loads(arguments.case)))) + "\n")
    elif arguments.loads:
        loads(arguments.loads)
    else:
        rows = []
        for case in QUICK if arguments.quick else CASES:
            rows.append(row(case))
            sys.stderr.write(f"{rows[-1]}\n")
        sys.stdout.write(json.dumps({"rows": rows, "load": load(6 if arguments.quick else 20)}) + "\n")


if __name__ == "__main__":
    main()
