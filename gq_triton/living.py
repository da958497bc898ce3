"""The living instances of a class, for what torch knows but hands to nobody."""

import gc
from typing import TypeVar

__all__ = ["living", "with_subclasses"]

T = TypeVar("T")


def living(kind: type[T]) -> list[T]:
    """Return every living instance of a class written in Python, those of its subclasses included.

    The collector looks through all objects for those that refer to the class, as an instance does
    to its type. That takes milliseconds in a small program and tens of them in a large one: call it
    once per run. Proxies, whose ``__class__`` is another than their type, are not returned, and
    neither is what ``gc.freeze()`` has put out of the collector's sight: to thaw it, and all else
    with it, is not ours to do.

    Examples:
        >>> class Rare: ...
        >>> one = Rare()
        >>> [found is one for found in living(Rare)]
        [True]
    """
    kinds = with_subclasses(kind)
    known = set(map(id, kinds))
    return [found for found in gc.get_referrers(*kinds) if id(type(found)) in known]


def with_subclasses(kind: type[T]) -> list[type[T]]:
    """Return a class and all classes that are derived from it, directly or not."""
    kinds = [kind]
    known = {id(kind)}  # by id, since a metaclass may compare its classes as it likes
    for one in kinds:
        for sub in type.__subclasses__(one):
            if id(sub) not in known:
                known.add(id(sub))
                kinds.append(sub)
    return kinds
