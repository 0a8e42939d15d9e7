"""What every policy has to keep to: this walks `resilient/policies/` and says what is missing.

Each check is a generator of complaints about one class, so that the last part can plant a bad policy and see
every one of them complain.
"""

import copy
import importlib
import inspect
import pickle
import pkgutil
import re
from datetime import timedelta
from math import inf, nan
from pathlib import Path

import pybreaker
import pytest

import resilient.asgi
import resilient.http
import resilient.policies
from resilient import Keyed, Pipeline, Policy, Rate, Retry, RetryBudget, Timeout, events, runtime, testing
from resilient.component import Component
from resilient.kinds import Gate, Race
from resilient.ticket import Ticket

ROOT = Path(resilient.__file__).parent.parent


def a_function(*_args, **_kwargs):
    return 2


async def an_async_function(*_args):
    return 2


class Ear(pybreaker.CircuitBreakerListener):
    def __repr__(self):
        return "<ear>"

    def __eq__(self, other):
        return isinstance(other, Ear)

    __hash__ = None


class Storage(pybreaker.CircuitMemoryStorage):
    def __init__(self, state=pybreaker.STATE_CLOSED):
        super().__init__(state)

    def __repr__(self):
        return "<storage>"

    def __eq__(self, other):
        return isinstance(other, Storage)

    __hash__ = None


class Anything:
    def __repr__(self):
        return "<anything>"


# The only things here that know single policies. LEGIT: a value that differs from the default, by option, or by
# class and option where two policies mean different things by a word. It is also what required options get.
LEGIT = {
    "breaker": pybreaker.CircuitBreaker(),
    "budget": RetryBudget(cap=3),
    "burst": 70,
    "cap": 20,
    "consecutive": 4,
    "cost": 2,
    "delay": 0.5,
    "failure_rate": 0.75,
    "interrupt": False,
    "interval": 0.5,
    "jitter": 0.5,
    "key": a_function,
    "lag": 0.5,
    "last": 40,
    "learn": True,
    "limit": 2,
    "listeners": (Ear(),),
    "max_abandoned": 3,
    "max_entries": 7,
    "max_keys": 7,
    "max_open_for": 90.0,
    "max_retry_after": 5.0,
    "minimum_calls": 5,
    "name": "orders",
    "on": OSError,
    "open_for": 7.0,
    "probe_lease": 20.0,
    "probes": 5,
    "queue": 3,
    "rate": Rate(90, per=2),
    "ratio": 0.2,
    "refill": 7.0,
    "refresh": 5.0,
    "seconds": 3.0,
    "slow": 1.5,
    "slow_rate": 0.75,
    "stale": 5.0,
    "stop": 4,
    "storage": Storage(),
    "timeout_cost": 3,
    "ttl": 60.0,
    "wait": 0.5,
    "window": 60.0,
    "Fallback.alternatives": "the alternative",
}
SHARED = {"breaker", "budget"}  # handed in to be shared, also by copies
NEEDED = {"Retry.on"}  # for plain functions
COMPANIONS = {"Bulkhead.wait": "queue", "CircuitBreaker.slow_rate": "slow"}  # what means nothing alone
# Strange values that are allowed all the same.
ALLOWED = {
    "cost": ["a_function"],
    "interrupt": ["True"],
    "jitter": ["0"],
    "key": ["a_function"],
    "learn": ["True"],
    "max_retry_after": ["0", "1.5"],
    "name": ["'text'"],
    "on": ["a_function"],
    "queue": ["0"],
    "ratio": ["0"],
    "refresh": ["0", "1.5"],
    "stale": ["0", "1.5"],
    "wait": ["1.5"],
    "RateLimit.wait": ["0", "1.5"],
    "Retry.wait": ["0", "1.5", "a_function"],
    "Retry.stop": ["a_function"],
    "CircuitBreaker.listeners": ["[]"],
}
SECONDS = ["delay", "interval", "lag", "max_open_for", "open_for", "probe_lease", "refill", "seconds"]
SECONDS += ["slow", "ttl", "window"]
ALLOWED |= {option: ["1.5"] for option in SECONDS} | {"ttl": ["0", "1.5"]}
BAD = {
    "<anything>": Anything(),
    "nan": nan,
    "inf": inf,
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "True": True,
    "'text'": "text",
    "b'bytes'": b"bytes",
    "[]": [],
    "{}": {},
    "a timedelta": timedelta(seconds=-1),
    "a class": Anything,
    "a_function": a_function,
    "an_async_function": an_async_function,
}


def policy_classes(package=resilient.policies):
    """Return the public policies and components of a package."""
    found = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        found += [
            cls
            for name, cls in vars(module).items()
            if isinstance(cls, type)
            and issubclass(cls, Component)
            and cls.__module__ == module.__name__
            and not name.startswith("_")
        ]
    return found


def entry(table, cls, option, default=None):
    return table.get(f"{cls.__name__}.{option}", table.get(option, default))


def options_of(cls):
    return inspect.signature(cls).parameters


def make(cls, **given):
    """Make an object with its required options and some more."""
    positional, keywords = [], {}
    for option in [COMPANIONS.get(f"{cls.__name__}.{option}") for option in given]:
        if option is not None:
            given.setdefault(option, entry(LEGIT, cls, option))
    for option, parameter in options_of(cls).items():
        value = given.get(option, entry(LEGIT, cls, option))
        wanted = f"{cls.__name__}.{option}" in NEEDED
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional.append(value)
        elif wanted or option in given or parameter.default is parameter.empty:
            keywords[option] = value
    return cls(*positional, **keywords)


def samples(cls):
    """Make an object with its required options only, and one for each other option, changed."""
    yield None, make(cls)
    for option in options_of(cls):
        yield option, make(cls, **{option: entry(LEGIT, cls, option)})


# -- the checks -----------------------------------------------------------------------------------------------


def files(cls):
    name = cls.__module__.rpartition(".")[2]
    if not list((ROOT / "tests" / "policies").glob(f"test_{name}*.py")):
        yield f"no tests/policies/test_{name}.py"
    if not (ROOT / "docs" / "policies" / f"{name}.md").is_file():
        yield f"no docs/policies/{name}.md"


def documentation(cls):
    module = importlib.import_module(cls.__module__)
    if not inspect.cleandoc(module.__doc__ or ""):
        yield "the module has no docstring"
    listed = section(cls, "Args")
    for option, parameter in options_of(cls).items():
        star = r"\*" if parameter.kind is parameter.VAR_POSITIONAL else ""
        if not re.search(rf"^ {{4}}{star}{option}: \S", listed, re.MULTILINE):
            yield f"the docstring does not describe {option}"


def section(cls, title):
    """Return a section of the docstring of a class, indented as it stands there."""
    found = re.search(rf"^{title}:\n((?: .*\n|\n)*)", inspect.cleandoc(cls.__doc__ or "") + "\n", re.MULTILINE)
    return found[1] if found else ""


def listed_events(cls):
    return set(re.findall(r"\b(?:[A-Z][a-z]+){2,}\b", section(cls, "Emits"))) - {"RetryBudget"}


def emitted_events(cls):
    return set(re.findall(r"\bevents\.([A-Z]\w+)", inspect.getsource(importlib.import_module(cls.__module__))))


def known_events():
    return {cls.__name__ for cls in events.Event.__subclasses__()}


def documented_events(cls):
    listed = listed_events(cls)
    for name in sorted(listed - known_events()):
        yield f"lists the event {name}, which does not exist"
    for name in sorted((emitted_events(cls) & known_events()) - listed):
        yield f"emits {name} without saying so"


def attributes(cls):
    for option, sample in samples(cls):
        if option is None:
            continue
        value = entry(LEGIT, cls, option)
        if options_of(cls)[option].kind is inspect.Parameter.VAR_POSITIONAL:
            value = (value,)
        if getattr(sample, option, Anything) != value:
            yield f"{option} is not kept in the attribute of that name"


def representation(cls):
    for option, sample in samples(cls):
        if option is None:
            continue
        try:
            shown = repr(sample)
        except AttributeError as error:
            yield f"repr fails: {error}"
            continue
        parameter = options_of(cls)[option]
        value = entry(LEGIT, cls, option)
        forms = (f"({value!r}", f"({value:g}" if isinstance(value, float) else f"({value!r}")
        leading = parameter.kind is not parameter.KEYWORD_ONLY
        if f"{option}=" not in shown and not (leading and any(form in shown for form in forms)):
            yield f"repr does not show {option}"


def validation(cls):
    for option in options_of(cls):
        if options_of(cls)[option].kind is inspect.Parameter.VAR_POSITIONAL:
            continue  # whatever is an answer
        for label, value in BAD.items():
            if label in entry(ALLOWED, cls, option, []):
                continue
            try:
                make(cls, **{option: value})
            except (TypeError, ValueError) as error:
                yield from incomplete(error, cls, option, value)
            except Exception as error:
                yield f"{option}={label} raises {type(error).__name__}"
            else:
                yield f"{option}={label} is accepted"


def incomplete(error, cls, option, value):
    for part in (cls.__name__, f"{option}=", repr(value)):
        if part not in str(error):
            yield f"the error for {option}={value!r} does not say {part}: {error}"


def use(component):
    """Return functions that use a component once, in both colours, and in a pipeline."""
    policy = component if isinstance(component, Policy) else Retry(on=OSError, wait=0, budget=component)

    def work(_argument):
        return 1

    async def awork(_argument):
        return work(_argument)

    async def asynchronous(policy):
        await policy.acall(awork, "abc")

    return (
        lambda: policy.call(work, "abc"),
        lambda: testing.run(asynchronous, policy),
        lambda: testing.run(asynchronous, policy, backend="trio"),
        lambda: Pipeline(policy).call(work, "abc"),
        lambda: testing.run(asynchronous, Pipeline(policy, name="outer")),
    )


def silence(cls):
    for option, sample in samples(cls):
        for attempt in use(sample):
            with testing.virtual_time(), testing.capture_events() as seen:
                attempt()
            if seen:
                yield f"a success with {option} emits {', '.join(event.name for event in seen)}"


class Queue(Gate):
    """Lets every call wait for a second."""

    def admit(self, call, now):
        runtime.sleep(1)
        ticket = Ticket()
        ticket.grant()
        return ticket


def dirty(component):
    """Change the state of a component, whatever it is: failures, calls inside of calls, and calls that waited."""

    if not isinstance(component, Policy):
        component.withdraw(OSError(), 0.0)
        return
    policy = Pipeline(Timeout(5, interrupt=False), component)  # nobody waits for ever

    def fail(_argument):
        raise OSError

    def nest(_argument, depth=0):
        if depth < 10:
            policy.call(nest, "abc", depth + 1)

    for guard, times in ((Pipeline(Queue(), policy), 2), (policy, 30)):
        for work in (fail, nest) * times:
            try:
                guard.call(work, "abc")
            except Exception:
                pass


def copies(cls):
    for option, sample in samples(cls):
        if option in SHARED:
            continue
        ways = [copy.copy, copy.deepcopy, lambda each: each.fresh()]
        try:
            pickle.dumps(entry(LEGIT, cls, option))
        except (TypeError, AttributeError):
            pass
        else:
            ways.append(lambda each: pickle.loads(pickle.dumps(each)))
        with testing.virtual_time():
            untouched = sample.statistics()
            dirty(sample)
            for way in ways:
                try:
                    other = way(sample)
                except Exception as error:
                    yield f"with {option} it cannot be copied: {error}"
                    continue
                if type(other) is not cls or repr(other) != repr(sample):
                    yield f"a copy of {sample!r} is {other!r}"
                if other.statistics() != untouched:
                    yield "a copy shares the state"


CHECKS = (
    files,
    documentation,
    documented_events,
    attributes,
    representation,
    validation,
    silence,
    copies,
)


# -- the policies keep to it --------------------------------------------------------------------------------------


def test_all_policies_are_found():
    names = {cls.__name__ for cls in policy_classes()}
    assert len(names) >= 8
    assert names >= {"Bulkhead", "CircuitBreaker", "RetryBudget"}
    assert all(getattr(resilient, name) for name in names), "every policy can be imported from resilient"
    assert names <= set(resilient.__all__)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("cls", policy_classes(), ids=lambda cls: cls.__name__)
def test_contract(cls, check):
    assert list(check(cls)) == []


@pytest.mark.parametrize("cls", policy_classes(), ids=lambda cls: cls.__name__)
def test_what_copies_are_checked_with_does_change_the_state(cls):
    component = make(cls)
    with testing.virtual_time():
        before = component.statistics()
        dirty(component)
        assert before is None or component.statistics() != before


def test_every_event_is_listed_by_somebody():
    components = [*policy_classes(), *policy_classes(resilient.http), *policy_classes(resilient.asgi), Keyed]
    listed = set().union(*map(listed_events, components))
    assert known_events() - listed == {"RaceStarted"}, "the kind of a policy that users write"
    assert "RaceStarted" in inspect.getsource(Race)


# -- and the checks find those that do not ------------------------------------------------------------------------


class Sloppy(Gate):
    """Does everything wrong.

    Emits:
        SloppyHappened.
    """

    def __init__(self, limit, *, window=1.0, name=None):
        super().__init__(name=name)
        self.window = 1.0
        self._limit = limit
        self._seen = STATE

    def admit(self, call, now):
        self._seen.append(call)
        self.emit(events.FallbackUsed, error="none")

    def statistics(self):
        return len(self._seen)


STATE = []


def test_a_bad_policy_is_found():
    complaints = {check.__name__: list(check(Sloppy)) for check in CHECKS}
    assert complaints["files"] == ["no tests/policies/test_test_contract.py", "no docs/policies/test_contract.md"]
    assert "the docstring does not describe limit" in complaints["documentation"]
    assert "lists the event SloppyHappened, which does not exist" in complaints["documented_events"]
    assert "emits FallbackUsed without saying so" in complaints["documented_events"]
    assert "window is not kept in the attribute of that name" in complaints["attributes"]
    assert "limit is not kept in the attribute of that name" in complaints["attributes"]
    assert "repr does not show limit" in complaints["representation"]
    assert "limit=nan is accepted" in complaints["validation"]
    assert "window=<anything> is accepted" in complaints["validation"]
    assert complaints["silence"]
    assert any("cannot be copied" in each for each in complaints["copies"])


class Forgetful(Gate):
    """Keeps its state in the class, hides an option, and refuses without saying what.

    Args:
        limit: How many.
        window: In how many seconds.
        name: Its name.
    """

    def __init__(self, limit, *, window=1.0, name=None):
        super().__init__(name=name)
        self.limit = limit
        self.window = window
        if not isinstance(limit, int) or limit < 1 or isinstance(limit, bool):
            raise ValueError("bad limit")

    def admit(self, call, now):
        STATE.append(call)

    def statistics(self):
        return len(STATE)

    def __repr__(self):
        return "Forgetful()"


def test_another_bad_policy_is_found():
    assert list(documentation(Forgetful)) == []
    assert "repr does not show window" in list(representation(Forgetful))
    complaints = list(validation(Forgetful))
    assert "the error for limit=-1 does not say Forgetful: bad limit" in complaints
    assert "the error for limit=-1 does not say limit=: bad limit" in complaints
    assert "a copy shares the state" in list(copies(Forgetful))
