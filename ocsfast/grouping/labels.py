"""The label algebra: which indices of which tensors disappear together.

Every dimension of every tensor carries a vector of **terms**, one for each index. A term is a set of
**atoms**, and an index is removed if any atom of its term is removed. The empty term is *frozen*: its
index is never removed. A label is *live* if some index may still be removed.

Operators add equations between terms. They are solved by substitution: an atom stands for itself, or for
a set of other atoms, as in a union-find whose nodes may have several parents. The indices that a dense
tensor keeps are a product over its dimensions, so one vector for each dimension says everything.

Vectors are int64 arrays of term numbers; None stands for a dimension that is frozen throughout.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.int64]  # [size] term numbers, to be read through Labels.terms
Dims = tuple[Vector | None, ...]  # the labels of one tensor: a vector or None for each dimension
Term = frozenset[int]  # a set of atoms

FROZEN = 0  # the number of the empty term


class Labels:
    """Atoms, terms and the equations between them."""

    def __init__(self) -> None:
        self._terms: list[Term] = [frozenset()]
        self._numbers: dict[Term, int] = {frozenset(): FROZEN}
        self._own: list[Term] = []  # the term of each atom alone
        self._stands_for: list[tuple[int, ...] | None] = []  # what replaces each atom; None: itself
        self._reason: dict[int, str] = {}  # frozen atoms, and why
        # Atoms that split() made for the dimension that moves faster: places within a head or a group.
        self._inner: set[int] = set()

    # -- making vectors ---------------------------------------------------------------------------

    def fresh(self, size: int, *, inner: bool = False) -> Vector:
        """A vector of `size` new atoms, each a term of its own."""
        first = len(self._stands_for)
        self._stands_for.extend([None] * size)
        if inner:
            self._inner.update(range(first, first + size))
        start = len(self._terms)
        new = [frozenset((atom,)) for atom in range(first, first + size)]
        self._terms.extend(new)
        self._own.extend(new)
        self._numbers.update(zip(new, range(start, start + size), strict=True))
        return np.arange(start, start + size, dtype=np.int64)

    def _number(self, term: Term) -> int:
        """The number of a term; a new one at its first appearance."""
        number = self._numbers.get(term)
        if number is None:
            number = self._numbers[term] = len(self._terms)
            self._terms.append(term)
        return number

    # -- reading vectors --------------------------------------------------------------------------

    def _roots(self, atom: int) -> tuple[int, ...]:
        """The atoms that `atom` stands for in the end, frozen ones included.

        The answer is stored as the atom's replacement, so that the next question is short.
        """
        below = self._stands_for[atom]
        if below is None:
            return (atom,)
        while len(below) == 1:  # the common case: a chain of single atoms
            beneath = self._stands_for[below[0]]
            if beneath is None:
                self._stands_for[atom] = below
                return below
            below = beneath
        stack = [atom]  # no recursion, because chains get longer than Python's stack
        while stack:
            below = self._stands_for[stack[-1]] or ()
            deep = [b for b in below if not self._is_settled(b)]
            if deep:
                stack.extend(deep)
                continue
            roots = dict.fromkeys(root for b in below for root in self._stands_for[b] or (b,))
            self._stands_for[stack.pop()] = tuple(roots)
        return self._stands_for[atom] or ()

    def _is_settled(self, atom: int) -> bool:
        """Whether an atom stands for itself, or for atoms that stand for themselves."""
        below = self._stands_for[atom]
        return below is None or all(self._stands_for[b] is None for b in below)

    def _resolved(self, number: int) -> Term:
        """The term of this number after all substitutions, without frozen atoms."""
        term = self._terms[number]
        if len(term) == 1:  # the common case: a channel that stands for itself or for one other
            (atom,) = term
            roots = self._roots(atom)
            if len(roots) == 1:
                return self._terms[FROZEN] if roots[0] in self._reason else self._own[roots[0]]
        return frozenset(root for atom in term for root in self._roots(atom) if root not in self._reason)

    def solution(self) -> Vector:
        """For every term number, the number of the term after all substitutions.

        `solution()[vector]` therefore settles any vector.
        """
        return np.array(
            [self._number(self._resolved(n)) for n in range(len(self._terms))], dtype=np.int64
        )

    def settled(self, vector: Vector) -> Vector:
        """The vector after all substitutions: equal numbers now mean equal terms."""
        distinct, where = np.unique(vector, return_inverse=True)
        numbers = [self._number(self._resolved(n)) for n in distinct.tolist()]
        return np.array(numbers, dtype=np.int64)[where]

    def term(self, number: int) -> Term:
        """The atoms of a settled term number."""
        return self._terms[number]

    def live(self, vector: Vector | None) -> bool:
        """Whether any index may still be removed."""
        return vector is not None and any(self._resolved(n) for n in dict.fromkeys(vector.tolist()))

    def reasons(self, vector: Vector | None) -> list[str]:
        """Why indices of a vector are frozen: distinct reasons in the order of the indices."""
        if vector is None:
            return []
        atoms = dict.fromkeys(a for n in dict.fromkeys(vector.tolist()) for a in self._terms[n])
        roots = dict.fromkeys(root for atom in atoms for root in self._roots(atom))
        return list(dict.fromkeys(self._reason[root] for root in roots if root in self._reason))

    def is_inner(self, atom: int) -> bool:
        """Whether the atom is a place within heads or groups, which a split made."""
        return atom in self._inner

    # -- equations --------------------------------------------------------------------------------

    def freeze(self, vector: Vector | None, reason: str) -> None:
        """No index of the vector is ever removed; `reason` is what users read."""
        if vector is not None:
            for number in np.unique(vector).tolist():
                self.freeze_atoms(self._resolved(number), reason)

    def freeze_atoms(self, atoms: Iterable[int], reason: str) -> None:
        """These atoms are never removed. An atom keeps its first reason."""
        for atom in atoms:
            self._reason.setdefault(atom, reason)

    def unify(self, a: Vector | None, b: Vector | None, reason: str) -> None:
        """Equate two vectors: index k of `a` is removed exactly if index k of `b` is.

        Args:
            a, b: vectors of one size. If one is None, the other is frozen.
            reason: why, for what this freezes.

        Raises:
            ValueError: the sizes differ.
        """
        if a is None or b is None:
            self.freeze(a, reason)
            self.freeze(b, reason)
            return
        if a.shape != b.shape:
            raise ValueError(f"{reason}: {a.size} labels meet {b.size}")
        differ = a != b
        pairs = np.unique(np.stack([a[differ], b[differ]], 1), axis=0)
        for left, right in pairs.tolist():
            self._unify(left, right, reason)

    def _unify(self, left: int, right: int, reason: str) -> None:
        while True:
            a, b = self._resolved(left), self._resolved(right)
            if a == b:
                return
            a, b = a - b, b - a
            if not a or not b:
                # One side holds all atoms of the other. What it has beyond can never be removed.
                why = self.reasons(np.array([left, right]))
                self.freeze_atoms(a | b, why[0] if why else reason)
                return
            if len(a) == 1 or len(b) == 1:
                one, other = (a, b) if len(a) == 1 else (b, a)
                (atom,) = one
                self._stands_for[atom] = tuple(sorted(other))
                if atom in self._inner and len(other) == 1:
                    self._inner.update(other)
                return
            # Several atoms on both sides have no single solution. Freeze the places within heads and
            # groups, so that those can go whole. Where there are none, freeze the atom in most terms,
            # and try again: that leaves the most freedom elsewhere.
            inner = [atom for atom in sorted(a | b) if atom in self._inner]
            self.freeze_atoms(inner or [self._most_used(a | b)], f"ambiguous: {reason}")

    def _most_used(self, atoms: Term) -> int:
        uses = dict.fromkeys(sorted(atoms), 0)
        for number in range(1, len(self._terms)):
            for atom in self._resolved(number) & atoms:
                uses[atom] += 1
        return max(uses, key=lambda atom: uses[atom])

    # -- merging and splitting dimensions ---------------------------------------------------------

    def merge(self, vectors: list[Vector | None], sizes: list[int]) -> Vector | None:
        """The vector of several dimensions flattened into one. The first moves slowest.

        An index of the result is removed if any of its parts is, so its term is the union of theirs.
        """
        merged: Vector = np.zeros(1, dtype=np.int64)
        for vector, size in zip(vectors, sizes, strict=True):
            part = np.zeros(size, dtype=np.int64) if vector is None else vector
            outer, inner = np.repeat(merged, size), np.tile(part, merged.size)
            merged = np.where(outer == FROZEN, inner, outer)
            both = (outer != FROZEN) & (inner != FROZEN)
            if both.any():
                pairs, where = np.unique(
                    np.stack([outer[both], inner[both]], 1), axis=0, return_inverse=True
                )
                numbers = [self._number(self._terms[p] | self._terms[q]) for p, q in pairs.tolist()]
                merged[both] = np.array(numbers, dtype=np.int64)[where.reshape(-1)]
        return merged if bool((merged != FROZEN).any()) else None

    def split(self, vector: Vector | None, sizes: list[int], reason: str) -> list[Vector | None]:
        """The vectors of one dimension unflattened into several; the inverse of `merge`.

        Seen as a table of rows (the first size) and columns (the rest), what all terms of a row share
        belongs to the row, and what all terms of a column share to the column. An atom that neither
        explains is refined: it then stands for a new row atom and a new column atom.
        """
        if vector is None or not self.live(vector):
            return [None] * len(sizes)
        if len(sizes) == 1:
            return [vector]
        rows, cols = sizes[0], vector.size // max(1, sizes[0])
        if rows == 1:
            return [None, *self.split(vector, sizes[1:], reason)]
        if cols == 1:
            return [vector, *[None] * (len(sizes) - 1)]
        table = self.settled(vector).reshape(rows, cols)
        if bool((table == table[:, :1]).all()):
            return [table[:, 0].copy(), *[None] * (len(sizes) - 1)]
        if bool((table == table[:1]).all()):
            return [None, *self.split(table[0].copy(), sizes[1:], reason)]
        terms = [[self._terms[number] for number in row] for row in table.tolist()]
        by_row = [frozenset.intersection(*row) for row in terms]
        by_col = [frozenset.intersection(*(terms[i][j] for i in range(rows))) for j in range(cols)]
        outer = np.array([self._number(term) for term in by_row], dtype=np.int64)
        inner = np.array([self._number(term) for term in by_col], dtype=np.int64)
        left_over = any(terms[i][j] - by_row[i] - by_col[j] for i in range(rows) for j in range(cols))
        if left_over:
            new_outer, new_inner = self.fresh(rows), self.fresh(cols, inner=True)
            outer, inner = self._joined(outer, new_outer), self._joined(inner, new_inner)
            self.unify(vector, self.merge([outer, inner], [rows, cols]), reason)
        return [outer, *self.split(inner, sizes[1:], reason)]

    def _joined(self, a: Vector, b: Vector) -> Vector:
        """The union of two vectors' terms, index by index."""
        pairs = zip(a.tolist(), b.tolist(), strict=True)
        return np.array(
            [self._number(self._terms[p] | self._terms[q]) for p, q in pairs], dtype=np.int64
        )
