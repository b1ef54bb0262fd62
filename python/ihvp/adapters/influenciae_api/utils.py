"""`deel.influenciae.utils`: the order of a top-k."""

import ihvp

ORDER = ihvp.Order
