"""What torch remembers of meshes that are gone, and how it forgets them."""

import sys
from contextlib import suppress
from importlib import import_module
from operator import attrgetter

__all__ = ["forget_meshes"]

_REMEMBERED = (
    ("torch.distributed.tensor.debug", "_clear_sharding_prop_cache"),
    ("torch.distributed.tensor._sharding_prop", "ShardingPropagator._propagate_tensor_meta_cached.cache_clear"),
    ("torch.distributed.tensor._redistribute", "clear_redistribute_planner_cache"),
    ("torch.distributed.tensor._redistribute", "_gen_transform_infos.cache_clear"),
)


def forget_meshes() -> None:
    """Has torch forget meshes: one that a cache still holds keeps groups that are gone, their threads and sockets."""
    for module, cache_clear in _REMEMBERED if "torch.distributed.tensor" in sys.modules else ():
        with suppress(AttributeError):  # not every version of torch has every cache
            attrgetter(cache_clear)(import_module(module))()
