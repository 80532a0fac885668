"""The part of this process among those that run one model: alone, leading or following."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import jax

from tpjax.attention import Backend
from tpjax.distributed import joining, num_processes, process_id, report_failure, start_timeout_s
from tpjax.errors import DistributedError, TpjaxError
from tpjax.runtime.follower import Follower
from tpjax.runtime.leader import Leader
from tpjax.runtime.memory import DeviceMemory
from tpjax.runtime.processes import Facts, surroundings

if TYPE_CHECKING:
    from tpjax.runtime.runner import Runner

_Load = TypeVar("_Load", bound=Callable[..., None])


@dataclass(frozen=True)
class Role:
    """The part of this process.

    Attributes:
        leader: in process 0 of several: what sends each dispatch to the others.
        follower: in the others: what runs them.
        memory: memory of this process's devices.
    """

    memory: DeviceMemory | None = None
    leader: Leader | None = None
    follower: Follower | None = None

    def decide(
        self, backends: Callable[[], Sequence[Backend]]
    ) -> tuple[DeviceMemory | None, Sequence[Backend]]:
        """Returns what all processes take: the least memory of one, and the backends that process 0 chooses.

        Args:
            backends: chooses the attention backend of each stage; called in process 0.
        """
        if self.leader is None and self.follower is None:
            return self.memory, backends()

        def decide() -> Facts:
            assert self.leader is not None
            each = [one for one in self.leader.gathered("memory") if one is not None]
            least = min(each, key=lambda one: int(one["free"]), default=None)
            return {"memory": least, "backends": [asdict(one) for one in backends()]}

        decisions = self.share(decide)
        memory = decisions["memory"] and DeviceMemory(**decisions["memory"])
        return memory, [Backend(**one) for one in decisions["backends"]]

    def share(self, decide: Callable[[], Facts]) -> Facts:
        """Returns what process 0 decides: plain data. The others wait for it.

        Args:
            decide: called in process 0.

        Raises:
            LostProcessError: process 0 cannot go on.
        """
        if self.follower is not None:
            return self.follower.decisions()
        decisions = decide()
        if self.leader is not None:
            self.leader.decide(decisions)
        return decisions

    def follow(self, runner: Runner | None = None, explain: Callable[[], Facts] | None = None) -> None:
        """In a follower, runs what process 0 sends until that has no more; elsewhere returns at once.

        Args:
            runner: runs it; ``None``: process 0 dispatches and compiles nothing.
            explain: describes the stages of this process, when process 0 asks.
        """
        if self.follower is not None:
            self.follower.follow(runner, explain)

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """If the block, which all processes run at the same time, fails in this one, tells the others."""
        try:
            yield
        except Exception as error:
            self.tell(_reason(error))
            raise

    def part(self) -> None:
        """Lets the processes go on by themselves; waits until all have come this far."""
        self.follow()
        if self.leader is not None:
            self.leader.close()

    def tell(self, why: str) -> None:
        """Tells the other processes that this one cannot go on: they would wait for it."""
        if self.follower is not None:
            self.follower.tell(why)
        elif self.leader is not None:
            self.leader.refuse(f"process 0 failed: {why}")
        elif num_processes() > 1:
            report_failure(f"process {process_id()} failed: {why}")  # they have not met yet


def tells_failure(load: _Load) -> _Load:
    """Decorates what loads a model: if it fails in one of several processes, the others are told.

    Args:
        load: sets its object's attribute ``role`` as soon as the processes have met.
    """

    @functools.wraps(load)
    def loading(model: Any, *args: Any, **kwargs: Any) -> None:
        try:
            load(model, *args, **kwargs)
        except Exception as error:
            getattr(model, "role", Role()).tell(_reason(error))
            raise

    return loading  # type: ignore[return-value]


@contextlib.contextmanager
def together(facts: Facts, memory: DeviceMemory | None = None) -> Iterator[Role]:
    """Joins the other processes, if there are any, for the block, which all of them run at the same time.

    They check that they would do the same, and watch each other: if one fails or is lost, all end.

    Args:
        facts: what must be the same in all of them, for :func:`join`.
        memory: memory of this process's devices.

    Yields:
        The part of this process.

    Raises:
        LostProcessError: a process is missing, or would do something else.
    """
    role = join(facts, memory)
    with role.telling():
        yield role
    role.part()


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, TpjaxError) else f"{type(error).__name__}: {error}"


def join(facts: Facts, memory: DeviceMemory | None) -> Role:
    """Joins the other processes, if there are any.

    Args:
        facts: what must be the same in all of them; versions, device, flags and code are added.
        memory: memory of this process's devices.

    Raises:
        LostProcessError: a process is missing, or would run something else.
        DistributedError: JAX sees other processes than those that met.
    """
    if jax.process_count() != num_processes():  # hosts of a TPU slice see each other in any case
        raise DistributedError(
            f"JAX sees devices of {jax.process_count()} processes, but {num_processes()} met: call "
            "initialize_distributed() in each, or give --distributed"
        )
    if num_processes() == 1:
        return Role(memory)
    same = {**surroundings(), **facts}
    own: dict[str, Any] = {"memory": None if memory is None else asdict(memory)}
    same = {name: list(value) if isinstance(value, tuple) else value for name, value in same.items()}
    joining(True)
    if process_id():
        role = Role(memory, follower=Follower(same, own, start_timeout_s()))
    else:
        role = Role(memory, leader=Leader(same, own, start_timeout_s()))
    joining(False)  # from now on their connection tells
    return role
