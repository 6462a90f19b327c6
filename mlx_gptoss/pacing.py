"""How many prompt tokens to feed at once: as many as take half a second on this machine, here.

macOS ends a process whose GPU work keeps the screen waiting ("Impacting Interactivity"), and the
error cannot be caught. A chunk costs more the deeper it lies in the context, so its size follows
the time that the last one took. It moves by factors of two, and only when it is clearly wrong:
other sizes round differently, and answers with a seed should not depend on a machine's mood.
"""

import math

TARGET_S = 0.5
FIRST = 128  # tokens, before anything is known; half a second on the slowest Mac that holds a model
LEAST = 32  # smaller chunks read all experts' weights for few tokens
GROW_BELOW = 0.45  # of the target: twice the chunk still leaves room for a deeper context


class ChunkPacer:
    """Chunk sizes for one machine and model, kept from prompt to prompt.

    Args:
        most: Tokens that are never exceeded, >= 1: memory is planned for them.
        target_s: Seconds that a chunk should take at most; infinity keeps every chunk at `most`.
    """

    def __init__(self, most: int, *, target_s: float = TARGET_S) -> None:
        self._most, self._target_s = most, target_s
        self.size = most if math.isinf(target_s) else min(most, FIRST)

    def note(self, tokens: int, seconds: float) -> None:
        """Learn from a chunk that was computed; one shorter than `size` says nothing of it.

        Args:
            tokens: It had.
            seconds: It took, the wait for its result included.
        """
        if tokens < self.size:
            return
        if seconds > self._target_s:
            over = math.ceil(math.log2(seconds / self._target_s))
            self.size = max(min(LEAST, self._most), self.size >> over)
        elif seconds < GROW_BELOW * self._target_s:
            self.size = min(self._most, 2 * self.size)
