"""What a utility costs: the forms of the density regulariser, `lambda * mean(penalty(u))`.

A gate's own gradient, du/dz = u (1 - u) for its logit z, fades where the gate is nearly open or nearly closed; the
forms differ in where they push.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

# Above it float32 has no gradient left to give, and the logarithm no value.
_ALMOST_ONE = 1.0 - 1e-6
_NEARLY_CLOSED = 0.02

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    # Even in u; in logits strongest at u = 1/2.
    "linear": lambda utility: utility,
    # Spares gates that are closed already.
    "square": lambda utility: utility.square(),
    # -log(1 - u): its gradient in logits is u, so that a wide open gate is pushed most.
    "log": lambda utility: -(-utility.clamp_max(_ALMOST_ONE)).log1p(),
    # Charges nearly full price for a gate that is half open, and goes on pushing closed gates down to about 0.02.
    "concave": lambda utility: (utility / _NEARLY_CLOSED).log1p() / math.log1p(1.0 / _NEARLY_CLOSED),
    # u + u (1 - u): also charges for being undecided.
    "binary": lambda utility: utility * (2.0 - utility),
}
