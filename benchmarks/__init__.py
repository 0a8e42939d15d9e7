"""What guarding a call costs, beside the peers and beside code written by hand.

    scripts/bench                     everything; takes about ten minutes
    scripts/bench --quick             a fifth of the rounds: rough, but good enough to see a mistake
    scripts/bench --only retry        the cases whose name contains "retry"
    scripts/bench --only httpx        HTTP clients; `sockets` for real connections
    scripts/bench --only asgi         the middleware of HTTP servers; `overload` and `rolling` for what servers do
    scripts/bench --json              the same as data

How it is measured
    A case is one question, such as "Retry, sync". Its subjects are this library, the peers and, where there is
    one, the smallest code that one would write by hand; all of them guard the same trivial function. Each
    subject calls it in a plain `for` loop, in batches of about a millisecond with the garbage collector off.
    The subjects of a case take turns, one batch each, for many rounds, and the fastest batch of each counts:
    other work on the machine only ever makes a batch slower. Each round has another order, and garbage is
    collected before each batch: who always came after a subject that leaves much of it would pay for it. The bare
    call takes its turns like the rest and is the unit: its ratio is 1, loop included. Async subjects run in one
    event loop, which gets a turn of its own between two batches.

    HTTP clients are measured twice. Over a mock transport, where the unit is the request of a bare client, or
    what the mock takes by itself. And over sockets, where a bare client and a guarded one take turns against a
    server in a process of its own: there, open sockets, tasks, threads and memory are counted, before and after.

    HTTP servers are measured in four ways. Applications called by hand, without a server. Under uvicorn, in a
    process of its own, by a client that takes less time than any server: there, the processor's time for a request
    is measured too, which other work on the machine changes less. Under three times the load that the server can
    take, where goodput counts: what was answered well while somebody waited. And with a million clients, for what
    is remembered of them.

    Before it is measured, every subject has to show that it works: that the retry retries, that the breaker
    opens, that the limiter refuses. Then it is given a limit that it never reaches while it is measured, the
    same for all. A subject that cannot be imported, or does not work, stays in the table as "not measured", with
    the reason.

    Memory is what the memory of a rate limiter grows by when it sees many keys, key strings not counted, as
    `tracemalloc` sees it, each subject in a process of its own.

How to read it
    Compare ratios, not nanoseconds: those belong to one machine on one day. Even ratios move by a tenth or so
    between two runs on a busy machine. "target" is what this library sets out to reach on CPython 3.11; nothing
    fails when it is missed, and no test looks at a time. Libraries differ in what they do for the price: a
    counter of failures in a row is cheaper than a failure rate over a window, and a lock that is not taken is
    cheapest of all.
"""
