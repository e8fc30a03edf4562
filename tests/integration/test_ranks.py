"""Several processes of one learner: they compute with what is published, train as one does, and resume as any."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from farflung.learner.ranks import Ranks  # noqa: E402
from ranked import check_as_one, compute_as_published, on_ranks, train, train_row_by_row  # noqa: E402

SHAPE = {"hidden_size": 32, "intermediate_size": 49, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
"""49 rows are shared by no number of ranks here."""


@pytest.fixture
def model(tmp_path: Path):
    def build(*, is_tied: bool, vocab: int = 33) -> Path:
        torch.manual_seed(0)
        config = transformers.Qwen3Config(
            **SHAPE, vocab_size=vocab, num_key_value_heads=2, tie_word_embeddings=is_tied, initializer_range=0.2
        )
        transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return build


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("world", "is_tied", "lora_rank"), [(4, True, 0), (3, False, 3)])
def test_all_ranks_compute_with_what_is_published(model, world: int, is_tied: bool, lora_rank: int) -> None:
    on_ranks(world, compute_as_published, model(is_tied=is_tied), lora_rank)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("lora_rank", "first", "second"), [(0, 4, 2), (3, 2, 1)])
def test_they_train_as_one_and_any_number_goes_on_from_any_checkpoint(
    model, tmp_path: Path, lora_rank: int, first: int, second: int
) -> None:
    folder, alone, many = model(is_tied=False), tmp_path / "alone", tmp_path / "many"
    for root in (alone, many):
        root.mkdir()
    train(Ranks(), folder, lora_rank, torch.float32, alone, 0, 2)
    on_ranks(first, train, folder, lora_rank, torch.float32, many, 0, 0)
    if second > 1:
        on_ranks(second, train, folder, lora_rank, torch.float32, many, 1, 1)
    train(Ranks(), folder, lora_rank, torch.float32, many, 2 if second > 1 else 1, 2)
    expected = torch.load(alone / "losses-2")
    found = [losses for path in sorted(many.glob("losses-*")) for losses in torch.load(path)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-3, atol=1e-4)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("world", "is_tied"), [(2, True), (3, False)])
def test_an_engine_over_all_ranks_checks_as_one_process_does(model, world: int, is_tied: bool) -> None:
    on_ranks(world, check_as_one, model(is_tied=is_tied))


@pytest.mark.timeout(300)
def test_models_that_take_one_row_at_a_time_leave_no_rank_waiting(model) -> None:
    on_ranks(2, train_row_by_row, model(is_tied=False))
