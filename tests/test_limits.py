"""A client's window holds at every moment, whatever is sent, and against a slow oracle."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from shallowdeep.attacks import slowdown
from shallowdeep.limits import CostWindow, OverBudget, costs_asked
from shallowdeep.network import ShallowDeepNetwork
from shallowdeep.policies import Confidence, Policy
from shallowdeep.runtime.engine import Engine
from shallowdeep.types import Answer
from shallowdeep.views import SecondLook
from test_attacks import STRONG
from victim import PIXELS, POLICY, pictures, victim


class Spending:
    """An engine that answers nothing and spends what its rows ask for, as far as the cap allows."""

    def __init__(self, policy: Policy = POLICY) -> None:
        self.sdn: ShallowDeepNetwork = victim()
        self.policy = policy
        self.second_look: SecondLook | None = None
        self.caps: list[float | None] = []

    def __call__(self, inputs: object, *, max_cost: float | None = None) -> Answer:
        assert isinstance(inputs, torch.Tensor)
        self.caps.append(max_cost)
        wanted = torch.tensor(self.sdn.plan.cost_E, dtype=torch.float64)[inputs[:, 0].long()]
        allowed = [cost for cost in self.sdn.plan.cost_E if max_cost is None or cost <= max_cost]
        if len(inputs) and not allowed:
            raise ValueError("below the first exit")
        cost_B = wanted.clamp(max=max(allowed)) if allowed else wanted
        none = torch.zeros(len(inputs), dtype=torch.int64)
        return Answer(
            labels_B=none,
            logits_BC=torch.zeros(len(inputs), 5),
            exit_B=none,
            confidence_B=none.double(),
            confusion_B=none.double(),
            cost_B=cost_B,
            valid_B=none.bool(),
            capped_B=cost_B < wanted,
        )


FIRST, FULL = victim().plan.cost_E[0], victim().plan.cost_E[-1]
LAST = victim().num_exits - 1


def rows_wanting(*exits: int) -> torch.Tensor:
    return torch.tensor(exits, dtype=torch.float32).reshape(-1, 1)


def greatest_allowance(spent: list[float], rows: int, budget: float, width: int) -> float:
    """By bisection: the greatest equal cost of ``rows`` more rows with no window of ``width`` over budget."""

    def fits(cost: float) -> bool:
        after = spent + [cost] * rows
        ends = range(len(spent) + 1, len(after) + 1)
        return all(sum(after[end - width : end]) <= budget * width + 1e-12 for end in ends)

    low, high = 0.0, FULL
    if fits(high):
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@pytest.mark.parametrize(("width", "budget"), [(1, 0.5), (5, 0.5), (12, 0.35), (7, FIRST)])
def test_allowance_and_bound_against_the_oracle(width: int, budget: float) -> None:
    generator = torch.Generator().manual_seed(width)
    window = CostWindow(Spending(), max_mean_cost=budget, rows=width)
    spent = [FIRST] * width
    exits = len(victim().plan.cost_E)
    for _ in range(60):
        rows = int(torch.randint(1, 2 * width + 1, (1,), generator=generator))
        # Half of the time the client wants all it can get.
        greedy = bool(torch.rand(1, generator=generator) < 0.5)
        wanted = torch.full((rows,), exits - 1) if greedy else torch.randint(exits, (rows,), generator=generator)
        allowed = window.allowance("c", rows)
        assert allowed == pytest.approx(max(FIRST, greatest_allowance(spent, rows, budget, width)), abs=1e-9)
        answer = window(rows_wanting(*wanted.tolist()), client="c")
        spent += answer.cost_B.tolist()
        assert window.mean_cost("c") == pytest.approx(sum(spent[-width:]) / width)
    means = [sum(spent[end - width : end]) / width for end in range(width, len(spent) + 1)]
    assert max(means) <= budget + 1e-9
    assert width in (1, 7) or max(means) > 0.8 * budget, "a budget that is never used checks nothing"


def test_clients_do_not_pay_for_each_other_and_old_ones_are_forgotten() -> None:
    window = CostWindow(Spending(), max_mean_cost=0.5, rows=4, clients=2)
    greedy = rows_wanting(*[LAST] * 8)
    window(greedy, client="a")
    assert window.allowance("a") < window.allowance("b")
    window(greedy, client="b")
    window(greedy, client="c")  # "a" was seen before "b"
    assert window.mean_cost("b") > FIRST
    assert window.mean_cost("a") == pytest.approx(FIRST)


def test_the_client_seen_least_lately_is_forgotten() -> None:
    window = CostWindow(Spending(), max_mean_cost=FULL, rows=1, clients=2)
    for client in ("often", "once", "often"):
        window(rows_wanting(LAST), client=client)
    window(rows_wanting(LAST), client="new")
    assert list(window._spent) == ["often", "new"]


def test_refusing_windows_refuse_and_recover() -> None:
    engine = Spending()
    window = CostWindow(engine, max_mean_cost=0.5, rows=10, over="refuse")
    answered = 0
    for _ in range(40):
        if window.allowance("a") < FULL:
            with pytest.raises(OverBudget, match="'a' may spend"):
                window(rows_wanting(LAST), client="a")
        else:
            answered += 1
            assert float(window(rows_wanting(LAST), client="a").cost_B) == FULL
        assert window.mean_cost("a") <= 0.5 + 1e-9
    assert 10 <= answered <= 20
    assert len(engine.caps) == answered, "refused rows never reach the engine"


def test_failed_rows_count_as_what_they_might_have_cost() -> None:
    class Failing(Spending):
        def __call__(self, inputs: object, *, max_cost: float | None = None) -> Answer:
            raise RuntimeError("out of memory")

    window = CostWindow(Failing(), max_mean_cost=0.5, rows=4)
    allowed = window.allowance("a")
    with pytest.raises(RuntimeError, match="memory"):
        window(rows_wanting(0), client="a")
    assert window.mean_cost("a") == pytest.approx((allowed + 3 * FIRST) / 4)


def test_threads_cannot_overdraw() -> None:
    """Rows in flight count as what they may cost: all threads are inside the engine at once."""
    together = threading.Barrier(4, timeout=20)

    class Slow(Spending):
        def __call__(self, inputs: object, *, max_cost: float | None = None) -> Answer:
            together.wait()
            return super().__call__(inputs, max_cost=max_cost)

    engine = Slow()
    window = CostWindow(engine, max_mean_cost=0.5, rows=4)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            answers = list(pool.map(lambda _: window(rows_wanting(LAST), client="a"), range(4)))
            assert sum(float(a.cost_B) for a in answers) <= 0.5 * 4 + 1e-9
    assert all(cap is not None and cap >= FIRST for cap in engine.caps)


def test_a_second_look_is_the_most_that_a_row_may_cost() -> None:
    engine = Engine(victim(), Confidence(threshold=0.9999), second_look="mirror", backend="torch")
    assert costs_asked(engine) == pytest.approx([*victim().plan.cost_E, FULL + 1])
    window = CostWindow(engine, max_mean_cost=1.2, rows=10)
    assert window.full_cost == pytest.approx(FULL + 1)
    noise = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    answers = [window(noise[i : i + 1], client="c") for i in range(60)]
    cost = torch.cat([answer.cost_B for answer in answers])
    assert int((cost > FULL).sum()) > 0, "somebody looked twice"
    assert bool(torch.cat([answer.capped_B for answer in answers]).any())
    padded = torch.cat([torch.full((10,), FIRST, dtype=torch.float64), cost])
    assert float(padded.unfold(0, 10, 1).mean(1).max()) <= 1.2 + 1e-9
    with pytest.raises(OverBudget, match=f"to the end it takes {FULL + 1:.3f}"):
        CostWindow(engine, max_mean_cost=FIRST, rows=2, over="refuse")(noise[:1], client="c")


def test_a_real_engine_under_attack_keeps_the_budget() -> None:
    images, _ = pictures(96, seed=2)
    moved = slowdown(victim(), images, STRONG, pixels=PIXELS)
    engine = Engine(victim(), POLICY, backend="torch")
    window = CostWindow(engine, max_mean_cost=0.6, rows=16)
    free = float(engine(moved).cost_B.mean())
    costs = torch.cat([window(moved[i : i + 8], client="sloth").cost_B for i in range(0, 96, 8)])
    assert free > 0.7 > 0.6 + 1e-9 >= float(costs.unfold(0, 16, 1).mean(1).max())


def test_a_cap_holds_for_every_row_under_attack_and_none_below_the_first_exit() -> None:
    images, _ = pictures(96, seed=2)
    moved = slowdown(victim(), images, STRONG, pixels=PIXELS)
    engine = Engine(victim(), POLICY, backend="torch")
    for cap in victim().plan.cost_E[:-1]:
        answer = engine(moved, max_cost=cap)
        assert float(answer.cost_B.max()) <= cap
        assert bool(answer.capped_B.any())
        assert bool(answer.valid_B.all())
    with pytest.raises(ValueError, match=r"below .* cost of the first exit"):
        engine(moved, max_cost=0.99 * FIRST)


def test_what_makes_no_window() -> None:
    with pytest.raises(ValueError, match=f"below {FIRST:.3f}, the cost of the first exit"):
        CostWindow(Spending(), max_mean_cost=0.99 * FIRST)
    with pytest.raises(ValueError, match="rows >= 1"):
        CostWindow(Spending(), max_mean_cost=0.5, rows=0)
    with pytest.raises(ValueError, match="'cap' or 'refuse'"):
        CostWindow(Spending(), max_mean_cost=0.5, over="wait")  # type: ignore[arg-type]
    later = Confidence(threshold=0.8, enabled_E=(False, False, True, True, True))
    with pytest.raises(ValueError, match="first exit asked"):
        CostWindow(Spending(later), max_mean_cost=victim().plan.cost_E[1])


def test_no_rows_cost_nothing() -> None:
    window = CostWindow(Spending(), max_mean_cost=0.5, rows=3)
    assert window(rows_wanting(), client="a").cost_B.shape == (0,)
    assert window.mean_cost("a") == pytest.approx(FIRST)


def test_sums_that_round_cap_nobody_within_budget() -> None:
    """Every window of rows that ran to the end costs the budget, but for rounding."""
    for rows in (7, 10, 100):
        window = CostWindow(Spending(), max_mean_cost=FULL, rows=rows, over="refuse")
        for count in (1, 2, 3) * 20:
            assert not bool(window(rows_wanting(*[len(victim().plan.cost_E) - 1] * count), client="c").capped_B.any())
