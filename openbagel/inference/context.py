"""One conversation's keys, values and position.

Contexts that share a past share its storage, as slices share an array::

    storage   [ system | picture | question | answer ·····free····· ]
    cfg_text  └─────────────────┘                  a fork: a length, no copy
    cond      └────────────────────────────┘       grows in place, being the longest of the living contexts on
    it

A context that is not the longest copies its past once, when it grows; one that only looks (denoising) joins
its past and the query in a scratch buffer for one layer, which it keeps for its next steps.
"""

from weakref import WeakSet

from torch import Tensor, device

from openbagel.config import LLMConfig

SLACK = 256
"""Free tokens of a new storage: room for the prompt after a picture, so that branches go on sharing."""


class Storage:
    """Keys and values of each layer, [2, capacity, kv heads, head width], where the layer runs; and the
    contexts that live on it.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.layers: list[Tensor | None] = [None] * layers
        self.contexts: WeakSet[Context] = WeakSet()

    def layer(self, index: int, like: Tensor) -> Tensor:
        """One layer's; allocated on the device and in the type of `like` when it is first asked for."""
        data = self.layers[index]
        if data is None:
            data = self.layers[index] = like.new_empty(2, self.capacity, *like.shape[-2:])
        return data

    def copy_past(self, old: "Storage", length: int) -> None:
        for index, data in enumerate(old.layers):
            if data is not None:
                self.layer(index, data)[:, :length] = data[:, :length]


class Context:
    """What has been said and shown so far; implements the attention's Cache.

    Two contexts that are equal by lineage (forked and not changed since) have the same `lineage`.
    """

    def __init__(self, llm: LLMConfig) -> None:
        self.llm = llm
        self.length = 0
        self.position = 0
        """The next rotary position."""
        self.lineage: object = "empty"
        self._storage: Storage | None = None
        self._scratch: dict[device, Tensor] = {}
        self._reserved = 0
        self._keep = False
        self._in_place = False
        self._extent = 0

    def __len__(self) -> int:
        return self.length

    def fork(self) -> "Context":
        """A context with the same past; nothing is allocated and neither sees what the other appends."""
        twin = Context(self.llm)
        twin.length, twin.position, twin.lineage = self.length, self.position, self.lineage
        twin._storage, twin._extent = self._storage, self.length
        if self._storage is not None:
            self._storage.contexts.add(twin)
        return twin

    def trim(self, length: int, position: int) -> None:
        """Forgets what was appended after the given length and rotary position."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot trim a context of {self.length} tokens to {length}")
        self.length = self._extent = length
        self.position, self.lineage = position, object()

    def reserve(self, tokens: int) -> None:
        """Announces that so many tokens will be appended, so that the storage grows once."""
        self._reserved = max(self._reserved, self.length + tokens)

    def prepare(self, tokens: int, *, keep: bool) -> None:
        """Announces a forward over so many new tokens; with keep they will be committed.

        The first context of a storage that announces so gets its free end; another one that grows takes a
        copy.
        """
        self._keep = keep
        self._in_place = self._is_tip
        self._extent = self.length + tokens if keep else self.length

    def commit(self, tokens: int, position: int) -> None:
        """Keeps the first `tokens` of those joined last, in every layer."""
        self.length = self._extent = self.length + tokens
        self.position = position
        self.lineage = object()

    def join(self, layer: int, k_TKH: Tensor, v_TKH: Tensor) -> tuple[Tensor, Tensor]:
        """The past's keys and values followed by the given ones, [length + T, K, H]; valid until the next
        call.
        """
        total = self.length + len(k_TKH)
        if self._keep:
            buffer = self._owned(total).layer(layer, k_TKH)
        elif self._in_place and self._storage is not None and total <= self._storage.capacity:
            buffer = self._storage.layer(layer, k_TKH)
        else:
            buffer = self._scratch_for(k_TKH, total)
            if self._storage is not None:
                buffer[:, : self.length] = self._storage.layer(layer, k_TKH)[:, : self.length]
        keys, values = buffer[0, :total], buffer[1, :total]
        keys[self.length :], values[self.length :] = k_TKH, v_TKH
        return keys, values

    @property
    def _is_tip(self) -> bool:
        """Whether no living context on the same storage reaches further."""
        others = self._storage.contexts if self._storage is not None else ()
        return all(other is self or other._extent <= self.length for other in others)

    def _owned(self, total: int) -> Storage:
        """A storage whose end is this context's, with its past and room for total tokens."""
        old = self._storage
        if old is not None and self._in_place and total <= old.capacity:
            return old
        capacity = max(total + SLACK, self._reserved, 0 if old is None else 2 * self.length)
        new = Storage(self.llm.num_hidden_layers, capacity)
        if old is not None:
            new.copy_past(old, self.length)
            old.contexts.discard(self)
        new.contexts.add(self)
        self._storage, self._in_place = new, True
        self._scratch.clear()
        return new

    def _scratch_for(self, like: Tensor, total: int) -> Tensor:
        scratch = self._scratch.get(like.device)
        if scratch is None or scratch.shape[1] < total:
            scratch = self._scratch[like.device] = like.new_empty(2, total, *like.shape[1:])
        return scratch
