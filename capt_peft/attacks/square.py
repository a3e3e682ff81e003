"""Square attack: random search with squares. It sees answers only, no gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..randomness import Generators, draw
from .base import AttackResult, Attempt, Batch, SearchAttack, check_settings, size_name, size_pattern, stage, tries
from .losses import margin
from .registry import register_attack
from .square_patch import random_corner, random_square, square_at
from .threat import LogitsFn, ThreatModel

# p is halved at these queries of 10,000; a search with another number of queries scales them (section 4.1)
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_BLOCK = 64  # queries whose random numbers are drawn at a time
_L2_STRIPES = 5  # squares along a side of the start (section 4.4)


@register_attack
@dataclass(frozen=True)
class Square(SearchAttack):
    """The Square attack (Andriushchenko et al. 2020, arXiv 1912.00049, algorithms 1 to 3).

    Keeps a change of the image in a random square if it shrinks the label's lead over the best other class. L-inf: starts from
    vertical stripes of +-epsilon, and sets each colour of a square to + or -epsilon. L2: starts from a grid of squares, and
    moves the perturbation of one square into another. L1: as L2, with lengths in L1 (Croce & Hein 2021, arXiv 2103.01208,
    section 5). The squares become smaller as the search goes on.

    Args:
        threat_model: the ball to stay in.
        queries: forwards of an attempt, at least 1.
        restarts: attempts, at least 1.
        p_init: share of the image that the first squares cover, more than 0, at most 1.

    Raises:
        TypeError: a setting has the wrong type.
        ValueError: a setting is out of range.
    """

    pattern = "square" + size_pattern("queries")
    help: ClassVar[dict[str, str]] = {"square": "5,000 queries; square-1000 has 1,000"}
    uses_gradients: ClassVar[bool] = False
    strong: ClassVar[bool] = True
    threat_model: ThreatModel
    _: KW_ONLY
    queries: int = 5000
    restarts: int = 1
    p_init: float = 0.8

    def __post_init__(self) -> None:
        check_settings(self, queries=1, restarts=1)
        if not 0 < self.p_init <= 1:
            raise ValueError(f"p_init={self.p_init} must be more than 0 and at most 1: a share of the image")

    @property
    def name(self) -> str:
        """The settings in short, those at their default left out: "square", "square-1000", "square-1000x2"."""
        share = "" if self.p_init == 0.8 else f"-p{self.p_init:.4g}"
        return "square" + size_name(self.queries, self.restarts, 5000) + share

    @property
    def passes(self) -> float:
        return self.queries * self.restarts / 2  # about half of the images leave early

    def attempts(self, num_classes: int) -> Iterator[tuple[str, Attempt]]:
        for where, *_ in tries([0], self.restarts):
            yield where, self._search

    def _search(self, logits_fn: LogitsFn, batch: Batch, clean_logits: Tensor) -> AttackResult:
        """Runs algorithm 1; an image leaves once it is misclassified."""
        images, labels, generators = batch.images, batch.labels, batch.generators
        linf = self.threat_model.norm == "linf"
        points = self._stripes(images, generators) if linf else self._grid(images, generators)
        best = points.clone()
        rows = torch.arange(len(images), device=images.device)
        loss = images.new_full((len(images),), -torch.inf)
        numbers = images  # until the second query draws them
        for query in range(self.queries):
            batch.tell(self.name, stage("query", query + 1, self.queries), len(rows))
            if query > 0:
                place = (query - 1) % _BLOCK
                if place == 0:
                    numbers = draw(torch.rand, (len(images), _BLOCK, 5 + images.shape[1]), generators).to(images.device)
                propose = self._new_square if linf else self._new_pair
                points = propose(best[rows], images[rows], numbers[rows, place], query)
            logits = logits_fn(points)
            wrong, gained = logits.argmax(1) != labels[rows], margin(logits, labels[rows]).to(loss.dtype)
            better = wrong | (gained > loss[rows])
            best[rows[better]], loss[rows[better]] = points[better], gained[better]
            rows = rows[~wrong]
            if len(rows) == 0:
                break
        return AttackResult(best, images.new_full((len(images),), torch.nan))

    def _side(self, query: int, height: int, width: int) -> float:
        """Returns the side of the squares of a query, not rounded: the square root of p times the image's area."""
        scaled = query / self.queries * 10_000
        p: float = self.p_init / 2 ** sum(scaled > halving for halving in _HALVINGS)
        return math.sqrt(p * height * width)

    # -------------------------------------------------------------------------------------------------------- L-inf

    def _stripes(self, images: Tensor, generators: Generators) -> Tensor:
        """Returns the images with vertical stripes of width 1 (section 4.2, "initialization")."""
        batch, channels, _, width = images.shape
        sign = _signs(draw(torch.rand, (batch, channels, 1, width), generators)).to(images)
        return self.threat_model.project(images + self.threat_model.epsilon * sign, images)

    def _new_square(self, best: Tensor, images: Tensor, numbers: Tensor, query: int) -> Tensor:
        """Returns points with one square set to the image +-epsilon, by colour (algorithm 2)."""
        height, width = best.shape[2:]
        side = min(max(round(self._side(query, height, width)), 1), height, width)
        inside = random_square(numbers[:, :2], side, best)  # (A, 1, H, W)
        sign = _signs(numbers[:, 5:])[:, :, None, None].to(images)  # (A, 3, 1, 1)
        moved = torch.where(inside, images + self.threat_model.epsilon * sign, best)
        return self.threat_model.project(moved, images)

    # ---------------------------------------------------------------------------------------------------- L2 and L1

    def _grid(self, images: Tensor, generators: Generators) -> Tensor:
        """Returns the images with a 5 x 5 grid of squares of random sign, at length epsilon (section 4.4)."""
        batch, channels, height, width = images.shape
        side = max(min(height, width) // _L2_STRIPES, 1)
        down, across = height // side, width // side
        numbers = draw(torch.rand, (batch, channels, down * across, 2), generators).to(images)
        sign, turn = _signs(numbers[..., 0]), numbers[..., 1] > 0.5  # (B, 3, squares)
        tile = _pyramid(side, images.device).to(images)
        tiles = torch.where(turn[..., None, None], tile.t(), tile) * sign[..., None, None]  # (B, 3, squares, s, s)
        tiles = tiles.view(batch, channels, down, across, side, side).transpose(3, 4)
        delta = torch.zeros_like(images)
        top, left = (height - down * side) // 2, (width - across * side) // 2
        delta[:, :, top : top + down * side, left : left + across * side] = tiles.reshape(
            batch, channels, down * side, across * side
        )
        return self._at_length_epsilon(delta, images)

    def _new_pair(self, best: Tensor, images: Tensor, numbers: Tensor, query: int) -> Tensor:
        """Returns points whose perturbation in one square has moved into another (algorithm 3)."""
        channels, height, width = best.shape[1:]
        smaller = min(height, width)
        side = max(round(self._side(query, height, width)), 3)
        side = min(side + (side % 2 == 0), smaller - (smaller % 2 == 0))
        delta = best - images
        into, out_of = random_square(numbers[:, :2], side, best), random_square(numbers[:, 2:4], side, best)
        sign = _signs(numbers[:, 5:])[:, :, None, None].to(images)  # (A, 3, 1, 1)
        turn = (numbers[:, 4] > 0.5)[:, None, None]
        tile = _pyramid(side, images.device).to(images)
        shape = _placed(
            torch.where(turn, tile.t(), tile), *random_corner(numbers[:, :2], side, best), best
        )  # (A, 1, H, W)
        old = delta * into
        order = self._order
        if order == 1:
            shape = shape / _length(shape, (2, 3), 1)
        fresh = sign * shape + old / _length(old, (2, 3), order).clamp_min(1e-12)  # (A, 3, H, W)
        # a colour may spend what it has in the two squares, and its share of what the image has left
        unused = (self.threat_model.epsilon**order - _length(delta, (1, 2, 3), order) ** order).clamp_min(0)
        budget = (_length(delta * (into | out_of), (2, 3), order) ** order + unused / channels) ** (1 / order)
        fresh = fresh / _length(fresh, (2, 3), order).clamp_min(1e-12) * budget  # budget: (A, 3, 1, 1)
        delta = torch.where(into, fresh, torch.where(out_of, 0, delta))
        return self._at_length_epsilon(delta, images)

    @property
    def _order(self) -> int:
        return 1 if self.threat_model.norm == "l1" else 2

    def _at_length_epsilon(self, delta: Tensor, images: Tensor) -> Tensor:
        scaled = delta / _length(delta, (1, 2, 3), self._order).clamp_min(1e-12) * self.threat_model.epsilon
        return self.threat_model.project(images + scaled, images)


def _signs(uniform: Tensor) -> Tensor:
    """Returns -1 or 1 for numbers in [0, 1)."""
    return (uniform >= 0.5).float() * 2 - 1


def _placed(tiles: Tensor, top: Tensor, left: Tensor, images: Tensor) -> Tensor:
    """Returns planes (A, 1, H, W) that hold each tile (A, s, s) at its upper left corner, (A,) each, and 0 elsewhere."""
    side = tiles.shape[-1]
    rows = torch.arange(images.shape[2], device=tiles.device) - top[:, None]
    columns = torch.arange(images.shape[3], device=tiles.device) - left[:, None]
    index = rows.clamp(0, side - 1)[:, :, None] * side + columns.clamp(0, side - 1)[:, None, :]  # (A, H, W)
    planes = tiles.flatten(1).gather(1, index.flatten(1)).view_as(index)
    return planes[:, None] * square_at(top, left, side, images)


def _length(delta: Tensor, dims: tuple[int, ...], order: int) -> Tensor:
    """Returns the L1 or L2 length of each image's values, or each colour's."""
    return delta.abs().sum(dims, keepdim=True) if order == 1 else delta.square().sum(dims, keepdim=True).sqrt()


@lru_cache(maxsize=64)
def _pyramid(side: int, device: torch.device) -> Tensor:
    """Returns the tile (s, s) of unit length: a pyramid with a positive and a negative half (section 4.4, Eq. 2)."""
    half = side // 2
    tile = torch.zeros(side, side, device=device)
    tile[:half], tile[half:] = _half_pyramid(half, side, device), -_half_pyramid(side - half, side, device)
    return tile / tile.norm().clamp_min(1e-12)


def _half_pyramid(height: int, width: int, device: torch.device) -> Tensor:
    """Returns the sum of rectangles around the centre, the k-th of weight 1 / (k + 1)^2, at unit length."""
    tile = torch.zeros(height, width, device=device)
    if height == 0:
        return tile
    middle = height // 2 + 1, width // 2 + 1
    for k in range(max(middle)):
        top, left = middle[0] - 1 - k, middle[1] - 1 - k
        tile[max(top, 0) : top + 2 * k + 1, max(left, 0) : left + 2 * k + 1] += 1 / (k + 1) ** 2
    return tile / tile.norm()
