"""What a request spends of a budget that something else than an override declares, such as the limiter of slowapi.

Whoever reads such declarations makes charges of them, which are data; the rate limit makes the budgets, spends and
refuses. Neither knows the other.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from starlette.exceptions import HTTPException
from starlette.types import Scope

from fastapi_hardening.core.context import RequestContext
from fastapi_hardening.core.headers import RawHeaders
from fastapi_hardening.core.problem import Problem
from fastapi_hardening.core.window import Decision, Limit, Strategy


class Charge(NamedTuple):
    """Units of one budget.

    Attributes:
        budget: What tells the budget from others, its limits included; the same in every worker.
        limits: The limits of the budget.
        strategy: How they are counted.
        key: Whose units they are.
        cost: How many.
        source: What has declared it.
    """

    budget: str
    limits: tuple[Limit, ...]
    strategy: Strategy
    key: str
    cost: int
    source: Any = None


class Spent(NamedTuple):
    """A charge, and what each of its limits said.

    Attributes:
        charge: The charge.
        decisions: A decision for each of its limits.
    """

    charge: Charge
    decisions: Sequence[Decision]

    @property
    def refused_by(self) -> int | None:
        """Which of the limits refuses, if one does."""
        return next((index for index, decision in enumerate(self.decisions) if not decision.allowed), None)


class Spender(Protocol):
    """The rate limit, for charges that can only be worked out when the request is further in."""

    async def spend_late(self, charges: Sequence[Charge], context: RequestContext) -> tuple[Problem, Spent] | None:
        """Spends them all or none; the refusal, with what refused."""
        ...

    def spend_now(self, charges: Sequence[Charge], context: RequestContext) -> tuple[Problem, Spent] | None:
        """The same where nothing can be awaited, counted in this process."""
        ...


class Declarations(Protocol):
    """Limits that are declared elsewhere."""

    def charges(
        self, scope: Scope, context: RequestContext, spender: Spender, *, defaults: bool
    ) -> Sequence[Charge] | None:
        """What a request spends; nothing where limits are lifted; ``None`` where nothing is said.

        Args:
            scope: The connection, not routed yet.
            context: What is known about it.
            spender: Who spends what only later can be told.
            defaults: Whether nothing else stands in place of a default.
        """
        ...

    def refused(self, problem: Problem, spent: Spent, scope: Scope) -> tuple[HTTPException, Scope]:
        """What the handlers of the application know this refusal as, and the scope that they see."""
        ...

    def write(self, headers: RawHeaders, spent: Sequence[Spent]) -> None:
        """Adds the header fields that the declarations ask for."""
        ...
