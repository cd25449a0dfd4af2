"""Import a function of the user's own code by `package.module:function`."""

import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

from hotload.errors import HotLoadError, did_you_mean
from hotload.sampling.reward.user_errors import describe_exception, secret_values


def import_function(
    name: str,
    arguments: Mapping[str, Any],
    refusal: Callable[[str, str], HotLoadError],
    *,
    positional_count: int = 0,
) -> Any:
    """Import the function, here and now, and see that it takes so many positional arguments and
    these by keyword.

    Args:
        refusal: makes the error of a name and a reason.

    Raises:
        HotLoadError: the refusal: not importable, nothing to call, or it cannot take them.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module of theirs may raise anything
        why = f"cannot be imported: {describe_exception(error, secret_values(os.environ))}"
        raise refusal(name, why) from error
    if not callable(found):
        raise refusal(name, f"found {type(found).__name__}, expected a function")
    try:
        signature = inspect.signature(found)
    except ValueError:
        return found  # a callable without a signature, such as one written in C
    try:
        signature.bind(*[None] * positional_count, **arguments)
    except TypeError as error:
        unknown = [one for one in arguments if one not in signature.parameters]
        hint = did_you_mean(unknown[0], signature.parameters) if unknown else ""
        why = f"cannot be called with its arguments: {error}{hint}"
        raise refusal(name, why) from None
    return found
