"""Completions of one prompt in one row of tokens, for replay and for the learner: the prompt is computed once.

A *tree* is a prompt and the completions that follow it, side by side in one row; an attention mask keeps completions,
and trees in one row, from seeing each other.

    row      p0 p1 p2 | a0 a1 a2 | b0 b1 | q0 q1 | c0
    place     0  1  2 |  3  4  5 |  3  4 |  0  1 |  2
    tree      0  0  0 |  0  0  0 |  0  0 |  1  1 |  1
    member   -1 -1 -1 |  0  0  0 |  1  1 | -1 -1 |  0

Legend: R fed rows of W tokens, N predicted tokens of all completions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

ROW_TOKENS = 512
"""Most tokens of a row that holds several completions; attention to what is masked grows with its square."""
_WORTH_SHARING = 0.5
"""A prompt shorter than this share of the completion is computed anew for each: masked attention would cost more."""
Text = tuple[int, tuple[int, ...], Sequence[int]]
"""A completion's index, its prompt, and its tokens, of which there is at least one."""


@dataclass(slots=True)
class Tree:
    """A prompt and the completions, by their index, that follow it."""

    prompt: tuple[int, ...]
    members: list[int] = field(default_factory=list)
    width: int = 0
    """Tokens that are fed: the last one of a completion predicts nothing."""

    @property
    def predicted(self) -> int:
        """Tokens of all its completions."""
        return self.width - len(self.prompt) + len(self.members)


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The input of a model."""

    ids_RW: torch.Tensor
    """int64, 0 where padded, which is on the right."""
    place_RW: torch.Tensor
    tree_RW: torch.Tensor
    """Which tree of the row a token belongs to, -1 for padding."""
    member_RW: torch.Tensor
    """Which completion of its tree, -1 for the prompt and for padding."""
    predictor_N: torch.Tensor
    """Place, counted over all rows, that predicts each token, completion by completion."""
    is_plain: bool
    """Whether each row is one completion, so that causal attention is enough."""

    def mask(self) -> torch.Tensor:
        """Which token sees which, bool (R, 1, W, W): the prompt, and what came before in its own completion."""
        column_W = torch.arange(self.ids_RW.shape[1], device=self.ids_RW.device)
        is_tree = self.tree_RW[:, :, None] == self.tree_RW[:, None, :]
        is_seen = (self.member_RW[:, None, :] < 0) | (self.member_RW[:, :, None] == self.member_RW[:, None, :])
        return (is_tree & is_seen & (column_W <= column_W[:, None]))[:, None]

    def predicting(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Which places predict anything (R, W), and which of these, in order, predicts each token (N,)."""
        is_kept_RW = torch.zeros_like(self.ids_RW, dtype=torch.bool)
        is_kept_RW.view(-1)[self.predictor_N] = True
        return is_kept_RW, (is_kept_RW.view(-1).cumsum(0) - 1)[self.predictor_N]


def trees(texts: Iterable[Text], most_tokens: int, *, are_long_joined: bool = False) -> list[Tree]:
    """Completions of one prompt together as far as `most_tokens` go, none where these are 0; the widest first.

    A completion that is so long that sharing is not worth it for itself begins a tree of its own. With
    `are_long_joined` shorter ones may still follow in that tree, else it stays alone.
    """
    open_to: dict[tuple[int, ...], Tree] = {}
    found: list[Tree] = []
    for index, prompt, ids in texts:
        tree, more = open_to.get(prompt), len(ids) - 1
        is_worth = len(prompt) >= _WORTH_SHARING * len(ids)
        if tree is None or not is_worth or tree.width + more > most_tokens:
            tree = Tree(prompt, width=len(prompt))
            found.append(tree)
            if is_worth or are_long_joined:
                open_to[prompt] = tree
        tree.members.append(index)
        tree.width += more
    return sorted(found, key=lambda tree: -tree.width)


def rows_of(rows: Sequence[Sequence[Tree]], ids: Mapping[int, Sequence[int]]) -> PackedRows:
    """Lists of trees as rows of tensors; `ids` has the tokens of each completion by its index."""
    width = max(sum(tree.width for tree in row) for row in rows)
    ids_RW, place_RW = torch.zeros(2, len(rows), width, dtype=torch.long)
    tree_RW, member_RW = torch.full((2, len(rows), width), -1)
    predictor: list[int] = []
    for r, row in enumerate(rows):
        at = 0
        for number, tree in enumerate(row):
            columns = slice(at, at + tree.width)
            fed, place, member, found = _lay(tree, ids)
            ids_RW[r, columns], place_RW[r, columns] = torch.tensor(fed), torch.tensor(place)
            tree_RW[r, columns], member_RW[r, columns] = number, torch.tensor(member)
            predictor += [r * width + at + column for column in found]
            at += tree.width
    is_plain = all(len(row) == 1 and len(row[0].members) == 1 for row in rows)
    return PackedRows(ids_RW, place_RW, tree_RW, member_RW, torch.tensor(predictor), is_plain)


def _lay(tree: Tree, ids: Mapping[int, Sequence[int]]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Ids, places and members of a tree's tokens, and the column that predicts each token of its completions."""
    start = len(tree.prompt)
    fed, place, member, predictor = list(tree.prompt), list(range(start)), [-1] * start, []
    for number, index in enumerate(tree.members):
        at, more = len(fed), len(ids[index]) - 1
        fed += ids[index][:-1]
        place += range(start, start + more)
        member += [number] * more
        predictor += [start - 1, *range(at, at + more)]
    return fed, place, member, predictor
