"""The module that stands in for an edited down projection, and the routes it reads."""

from wise_ext.nn.dual_linear import DualLinear
from wise_ext.nn.route_state import Course, Glance, RouteState

__all__ = ["Course", "DualLinear", "Glance", "RouteState"]
