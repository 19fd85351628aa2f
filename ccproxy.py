#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""ccproxy: use a Command Code subscription from any OpenAI or Anthropic client.

    python3 ccproxy.py                 listen on 127.0.0.1:3000
    python3 ccproxy.py --help          every option
    python3 ccproxy.py --check         the configuration in effect, and where it came from
    python3 ccproxy.py --demo          the same without an account: answers from inside the program
    python3 ccproxy.py run claude      start a client by way of it (also codex, opencode, ...)
    python3 ccproxy.py selftest        every feature tried against that, one line each

One file, no dependency but Python 3.9 or newer.  A client's request comes in at the top of an
hourglass, passes its waist, and the answer goes out at the bottom in the client's own API:

    a client's request                                      the client's answer
      OpenAI chat        \\                                  /  SSE frames or one JSON body
      Anthropic messages  > Prompt -> upstream -> Events <     written by the face that
      OpenAI responses   /    (one body)   (one grammar)  \\  serves the client

A face is one public API; it knows its own format and the waist, never the upstream.  The upstream
format knows its own format and the waist, never a face.  Everything above the line THE SHELL is
pure: no socket, file, clock, environment or chance.  What is below it talks to the world.

Parts, in order (`grep -n '^# === PART'` gives their lines; R.., FIELD, UPSTREAM
and HTTP.md in comments name the project's notes on what clients and upstream really do):

    BASICS (pure)               constants and limits, errors, options, config, redaction, log lines
    HTTP (pure)                 heads, lengths, chunks, codings, framing, JSON text, attached data
    WAIST (pure)                prompt, events, grammar, content, tools, repair, tokens, filters
    UPSTREAM FORMATS (pure)     what formats share, alpha, OpenAI, Anthropic: from Prompt, to events
    APIS (pure)                 chat, messages, responses: to Prompt, from events
    ANSWER (pure)               the one read loop, the fast lane
    BACKENDS AND MODELS (pure)  catalogue, names, aliases, allowed models, lists
    ACCOUNTS (pure)             keys, rings, operator and client keys, figures, state, routing
    OPERATION (pure)            records, usage, metrics, alerts, admin access, diagnoses, units
    PAGE (pure)                 the dashboard as data
    RUNTIME                     App, settings, safe files, sockets, wire, backends
    CALLS                       upstream calls, the pool, the accounts' questions, alerts
    ANSWERING                   relay, retries, bodies, jobs, generation
    SERVER                      admin, reload, restart, events, usage log, endpoints, server
    COMMANDS                    demo, selftest, terminal, each command, command line
"""
from __future__ import annotations      # Python 3.9 or newer is needed

import asyncio
import base64
import bisect
import errno
import gc
import hashlib
import hmac
import json
import logging
import os
import re
import signal
import socket
import ssl
import sys
import time
import zlib
from array import array
from collections import Counter, defaultdict, deque, namedtuple
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import groupby
from math import ceil, log
from operator import ge, gt, le, lt
from sys import intern
from typing import (Any, Awaitable, Callable, Collection, Deque, Dict, FrozenSet, Iterable,
                    Iterator, List, Mapping, NamedTuple, Optional, Set, Tuple, Union)
from urllib.parse import unquote, urlsplit

NEEDED: str = "ccproxy needs Python 3.9 or newer"   # older parsers stop here, and show this line
if sys.version_info < (3, 9):
    sys.exit(NEEDED + "; this is %d.%d." % sys.version_info[:2])
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C while the rest is read: no traceback

__version__ = "0.1.0"

Json = Dict[str, Any]        # a decoded JSON object
SLOTS: Dict[str, Any] = {"slots": True} if sys.version_info >= (3, 10) else {}   # small instances

# === PART: BASICS (pure) ====================================================
# === CONSTANTS & LIMITS (pure) ==============================================
# Every number and fixed string that more than one function needs, with its
# unit and its reason.  What a person may want to change is an option instead
# (CONFIG); what only a test wants to shrink is a field of `Limits`.

KIB, MIB = 1024, 1024 * 1024

MAX_REQUEST_LINE_BYTES = 16 * KIB   # RFC 9112 3 asks for 8000 at least; then 414
MAX_HEAD_BYTES = 64 * KIB           # 8x what browsers send; a longer head is an attack: 431
MAX_HEAD_FIELDS = 128               # HAProxy 101, Envoy 100; the same for trailers
MAX_LEADING_CRLFS = 4               # RFC 9112 2.2: ignore at least one before a request line
MAX_CHUNK_LINE_BYTES = 4 * KIB      # size and extensions; CVE-2023-39326 was an endless one
CHUNK_OVERHEAD_FACTOR = 16          # framing bytes allowed per data byte, plus the next line
CHUNK_OVERHEAD_BYTES = 16 * KIB
MAX_INTERIM_HEADS = 8               # 1xx answers skipped before the real one
MAX_LINE_BYTES = 32 * MIB           # one upstream event; start-step lines (skipped) echo requests
MAX_CALLS = 1000                    # tool calls of one answer; more is an upstream gone wild
MAX_SIGNATURE_BYTES = MIB           # of one thinking block, whose withheld text may be in it
MAX_KEPT_BYTES = 64 * MIB           # of one answer, where it is kept whole until its end
MAX_GZIP_MEMBERS = 64               # each copies what is behind it: many would be quadratic
MAX_JSON_DEPTH = 500                # deeper than any schema; the same on every Python
MAX_INFLATED_BYTES = 32 * MIB       # what one upstream read may become when it was compressed
MAX_ERROR_BODY_BYTES = 64 * KIB     # of an upstream error answer; the rest says nothing new
MAX_ERROR_TEXT = 2000               # characters of an upstream message that are shown
MAX_NOTE_BYTES = 1024               # the x-ccproxy-notes header; clients cap heads at 8-16 KiB
MAX_LOG_VALUE = 1100                # characters of one value in a log line: all notes fit
MAX_SESSION_VALUE = 512             # characters of a client's session header that count
MAX_FAMILIES = 64                   # of models whose token counts are learned
MAX_ITEMS = 500                     # of Responses that are remembered for references
MAX_ITEM_BYTES = 64 * KIB           # a longer one is not
MAX_RETRY_AFTER_SECONDS = 24 * 3600  # a longer one is a mistake of somebody's clock
GC_THRESHOLDS = (20_000, 20, 20)    # a request makes ~1000 objects and hardly a cycle: -15 % CPU
READ_BYTES = 64 * KIB               # at most this per read and turn: fairness between streams
SEND_BYTES = 256 * KIB              # at most this in one call
TLS_SEND_BYTES = 16 * KIB           # one record: OpenSSL wants a call repeated as it was
HIGH_WATER_BYTES = 64 * KIB         # unsent output at which whoever writes must wait,
LOW_WATER_BYTES = 16 * KIB          # and at which it goes on
BACKLOG = 1024                      # connections that the system holds until they are accepted
ACCEPTS_PER_TURN = 16
READ_AHEAD_BYTES = 64 * KIB         # of a next request while an answer runs; more is a flood
BUFFER_BYTES = 256 * KIB            # unread input at which a connection stops reading
MAX_REFUSALS = 16                   # closed with patience at once; the rest may see a reset
BIG_BODY_BYTES = 512 * KIB          # a body whose steps others would feel
DISCARD_BYTES = 64 * KIB            # of an unwanted body that is read rather than hung up on

MAX_OUTPUT_TOKENS = 200_000         # the upstream answers 400 above this, for every model
DEFAULT_OUTPUT_TOKENS = 64_000      # what the vendor's own client sends
MAX_TOOL_NAME = 64                  # OpenAI's limit; Anthropic takes 128, others less
MAX_STOPS = 64                      # stop sequences of one request (OpenAI takes 4): each piece of
MAX_STOP_CHARS = 1024               # text is searched for all of them

DEFAULT_CLI_VERSION = "1.64.0"      # x-command-code-version: the newest that was studied
DEFAULT_MODEL = "deepseek/deepseek-v4-flash"    # the vendor's own default, on every plan
DEFAULT_SIGNATURE = "ccproxy"       # SDKs want a string where the upstream signed nothing

KEY_PATTERN = re.compile(r"user_[A-Za-z0-9_-]+")
KEY_LIKE = re.compile(      # what an id must not be; also percent-encoded, however often
    r"user(?:_|%(?:25)*5[Ff])(?!id(?![A-Za-z0-9_-]))[A-Za-z0-9_-]+")
VERSION_PATTERN = re.compile(r"[0-9]+(\.[0-9]+){1,3}([-+.][0-9A-Za-z.-]+)?")
SURROGATE = re.compile("[\ud800-\udfff]")


class Limits(NamedTuple):
    """Time limits in seconds and the sizes that tests shrink."""

    head: float = 20.0              # from a request's first byte to its whole head; then 408
    first_request: float = 60.0     # a new connection that stays silent
    keep_alive: float = 75.0        # between requests; longer than clients' own pools keep
    body_idle: float = 30.0         # without one byte of a request body
    body_grace: float = 60.0        # after this, a body must average `body_rate`
    body_rate: int = 500            # bytes per second: slower is a slowloris
    write_stalled: float = 120.0    # a client that reads nothing is dropped after this
    linger: float = 2.0             # reading on after an early answer, so that no RST eats it
    silence: float = 15.0           # to the first decisive event, and between SSE comments
    after_end: float = 1.0          # reading on for the cost after the answer's end
    error_body: float = 10.0        # for the body of an upstream error answer
    pool_idle: float = 60.0         # an idle upstream connection is closed after this
    pool_size: int = 64             # idle upstream connections kept
    sweep: float = 0.5              # how often deadlines are looked at
    watch: float = 0.5              # how often --watch looks at its files
    first_grace: float = 0.5        # for a new connection's first request, when we stop
    backoff: Tuple[float, ...] = (0.5, 1.5)     # before the 2nd and 3rd attempt
    short_retry_after: float = 2.0  # a longer wait is the client's decision, not ours
    side_call: float = 10.0         # the model list
    figures_wait: float = 0.3       # a request waits this long for accounts not known yet
    list_wait: float = 3.0          # a client's /v1/models waits this long for a fresh list
    npm: float = 20.0               # `npm view`, for cliVersion auto
    alert_tick: float = 5.0         # how often it is looked whether accounts are due a look
    webhook: float = 10.0           # for the answer of alertWebhookUrl
    webhook_backoff: Tuple[float, ...] = (2.0, 15.0, 60.0, 300.0)   # between its attempts
    usage_batch: float = 1.0        # how long records wait for others before they are written
    usage_retry: float = 5.0        # and for a database that could not be written
    usage_busy: float = 2.0         # while another process writes
    usage_end: float = 3.0          # for the last of them, at the end
    restart: Tuple[float, float] = (1.0, 60.0)  # a periodic task after a fault: at first, at most
    bodies: int = 256 * MIB         # request bodies in memory at once; then 503
    followers: int = 32             # readers of /admin/events at once; then 503
    news: float = 1.0               # how often they are told of a change


# === ERRORS (pure) ==========================================================
# `ProxyError` is the one exception that crosses functions.  FAILURES is the
# one table of what can go wrong: which upstream failure is meant (by its code,
# its status, or words that refine that status), and what the client is told in
# either API.  How an upstream writes its errors is its format's business.

NEVER, CLIENT, BOTH = "never", "client", "both"     # who may try the same request again


def counted(number: float, noun: str, ending: str = "s") -> str:
    """A number with its noun in the singular or the plural: 1 second, 2.5 seconds."""
    return "%.10g %s%s" % (number, noun, "" if number == 1 else ending)


class Failure(NamedTuple):
    """One row: an upstream's failure, and the answer that a client gets for it."""

    kind: str
    status: int                     # ours
    code: Optional[str]             # error.code of Chat Completions
    again: str = NEVER              # which sends x-should-retry: false
    anthropic: str = "invalid_request_error"    # error.type of Messages
    openai: str = "invalid_request_error"       # error.type of Chat Completions
    upstream: Tuple[int, ...] = ()  # upstream statuses that mean it; () = by the rest, or ours
    words: str = ""                 # pattern in the upstream's message, any case: see `refines`
    codes: Tuple[str, ...] = ()     # an upstream's code, type or name that means it, lower case
    refines: Tuple[Optional[int], ...] = ()     # statuses in which `words` mean it; None: untold


FAILURES = (
    # A code counts whatever the status.  Words never outrank a status: they refine some.
    Failure("billing", 402, "insufficient_quota", NEVER, "billing_error", "insufficient_quota",
            (402,), r"premium_credits_exhausted|credit balance is too low"
            r"|insufficient[ _](credits?|balance|funds)",
            ("premium_credits_exhausted", "insufficient_quota", "insufficient_credits",
             "insufficient_balance", "billing_error", "payment_required",
             "billing_hard_limit_reached", "exceeded_current_quota_error"), (400, 403, 429, None)),
    Failure("plan", 403, "model_not_in_plan", NEVER, "permission_error", "permission_error", (),
            r"model_not_in_plan|upgrade_required",
            ("model_not_in_plan", "upgrade_required", "usage_not_included"), (400, 403, None)),
    # Bedrock throttles with "Too many tokens, please wait": anomalyco/opencode#39620.
    Failure("too_long", 400, "context_length_exceeded",
            words=r"prompt is too long|context[ _](length|window)|maximum context"
            r"|too many (input )?tokens(?!,? (please wait|per (second|minute|hour|day)))"
            r"|input is too long|input token count|exceeded model token limit",
            codes=("context_length_exceeded",), refines=(400, 413, None)),
    Failure("model", 404, "model_not_found", NEVER, "not_found_error",
            words=r"model/provider not recognized|unsupported_model|model_not_found"
            r"|unknown model(?! error)", codes=("model_not_found", "unsupported_model"),
            refines=(400, 403, 404, None)),
    Failure("usage_window", 429, "usage_limit_reached", NEVER, "rate_limit_error",
            "usage_limit_reached", (), r"usage limit|usage_limit|window limit",
            ("usage_limit_reached", "usage_limit_exceeded"), (429, None)),
    Failure("invalid", 400, None, upstream=(400, 405, 406, 411, 415, 417)),
    Failure("authentication", 401, "invalid_api_key", NEVER, "authentication_error",
            "authentication_error", (401,)),
    Failure("permission", 403, "permission_denied", NEVER, "permission_error", "permission_error",
            (403, 451)),
    Failure("not_found", 404, "not_found", NEVER, "not_found_error", upstream=(404, 410)),
    Failure("timeout", 504, "timeout", BOTH, "timeout_error", "timeout_error", (408, 504)),
    Failure("too_large", 413, "request_too_large", NEVER, "request_too_large", upstream=(413,)),
    Failure("unprocessable", 422, "unprocessable", upstream=(422,)),
    Failure("rate_limit", 429, "rate_limit_exceeded", BOTH, "rate_limit_error",
            "rate_limit_exceeded", (429,)),
    Failure("unavailable", 503, "service_unavailable", BOTH, "overloaded_error", "server_error",
            (503,)),
    Failure("overloaded", 529, "overloaded", BOTH, "overloaded_error", "server_error", (529,)),
    Failure("upstream", 502, "upstream_error", BOTH, "api_error", "server_error"),
    # From here on: what is not told by an upstream's status or words.
    Failure("unreachable", 502, "upstream_error", BOTH, "api_error", "server_error"),
    Failure("upstream_final", 502, "upstream_error", NEVER, "api_error", "server_error"),
    Failure("empty", 502, "empty_response", NEVER, "api_error", "server_error"),
    Failure("late", 504, "timeout", CLIENT, "timeout_error", "timeout_error"),
    Failure("unconnected", 504, "timeout", CLIENT, "timeout_error", "timeout_error"),
    Failure("method", 405, "method_not_allowed"),
    Failure("slow_client", 408, "request_timeout", CLIENT, "timeout_error", "timeout_error"),
    Failure("length_required", 411, "length_required"),
    Failure("target_too_long", 414, "uri_too_long"),
    Failure("encoding", 415, "unsupported_encoding"),
    Failure("expectation", 417, "expectation_failed"),
    Failure("head_too_large", 431, "head_too_large"),
    Failure("internal", 500, "internal_error", CLIENT, "api_error", "server_error"),
    Failure("not_implemented", 501, "not_implemented"),
    Failure("busy", 503, "busy", CLIENT, "overloaded_error", "server_error"),
    Failure("upgrade", 426, "upgrade_refused"),
    Failure("http_version", 505, "http_version"),
    Failure("config", 500, "config", NEVER, "api_error", "server_error"),
)


KINDS = {row.kind: row for row in FAILURES}
CODE_KINDS = {code: row.kind for row in FAILURES for code in row.codes}


class ProxyError(Exception):
    """Whatever a client (or, of kind `config`, the person who starts us) must be told.  `kind`
    names a row of FAILURES.  Known besides, where it is known: `status`, `code` (the upstream's own
    word), `param` (path of the field at fault), `details`, `retry_after` (seconds), `retryable` (we
    may try again), `trace_id` (the upstream's)."""

    def __init__(self, kind: str, message: str, **known: Any) -> None:
        super().__init__(message)
        row = KINDS[kind]
        self.kind, self.message = kind, message
        self.status: int = known.get("status") or row.status
        self.code: Optional[str] = known.get("code")
        self.param: Optional[str] = known.get("param")
        self.details: Optional[Json] = known.get("details")
        self.retry_after: Optional[float] = known.get("retry_after")
        self.retryable: bool = known.get("retryable", row.again == BOTH)
        self.trace_id: Optional[str] = known.get("trace_id")


STATUS_KINDS = {status: row.kind for row in reversed(FAILURES) for status in row.upstream}


def classify_failure(status: Optional[int], code: str, message: str) -> str:
    """The kind of an upstream failure, whose status None means that none was told."""
    kind = CODE_KINDS.get(code.lower())
    if kind is not None:
        return kind
    for row in FAILURES:
        if status in row.refines and re.search(row.words, message, re.I):
            return row.kind
    otherwise = "invalid" if 400 <= (status or 0) < 500 else "upstream"
    return STATUS_KINDS.get(status or 0, otherwise)


def error_fields(error: ProxyError) -> List[Tuple[str, str]]:
    """The response headers that go with an error."""
    fields = []
    if error.retry_after is not None:
        fields.append(("retry-after", "%d" % -(-error.retry_after // 1)))
    if KINDS[error.kind].again != CLIENT and not error.retryable:
        fields.append(("x-should-retry", "false"))
    if error.kind == "authentication":
        fields.append(("www-authenticate", 'Bearer realm="Command Code"'))
    return fields


def error_extras(error: ProxyError) -> Json:
    """What both APIs' error objects carry beyond their own members, where it is known."""
    extras: Json = {}
    if error.details:
        extras["details"] = error.details
    if error.code:
        extras["upstream_code"] = error.code
    if error.retry_after is not None:
        extras["retry_after"] = int(-(-error.retry_after // 1))
    if error.trace_id:
        extras["trace_id"] = error.trace_id
    return extras


# === OPTIONS (pure) =========================================================
# One row is one option: its flag, its environment names, its entry in
# config.json, its line in --help and in the README's table all come from it.

BOOLEAN_WORDS = {"1": True, "true": True, "yes": True, "on": True,
                 "0": False, "false": False, "no": False, "off": False}
LOG_LEVELS = ("debug", "info", "warning", "error", "silent")
OTHER_LEVELS = {"trace": "debug", "warn": "warning", "fatal": "error"}     # pino's words
ALERT_VARIABLES = "COMMANDCODE_BALANCE_ALERT_"
ALERT_SWITCH = ALERT_VARIABLES + "ENABLED"
MULTIPLIER = "COMMANDCODE_MAX_TOTAL_IN_FLIGHT_MULTIPLIER"       # requests per operator's key
SPAN_UNITS = {"ms|msecs?|milliseconds?": 0.001, "s|secs?|seconds?": 1, "m|mins?|minutes?": 60,
              "h|hrs?|hours?": 3600, "d|days?": 86_400}         # in seconds


class Option(NamedTuple):
    """One option.  `kind` names a row of VALUE_READERS; `choices` bounds or lists its values."""

    name: str
    kind: str
    default: Any
    help: str
    env: Tuple[str, ...] = ()       # besides CC_ and the name in upper snake case; ..._MS: in ms
    choices: Tuple[Any, ...] = ()
    at_start: bool = False          # a change counts from the next start on
    lent: bool = False              # a vendor's key; its variable is other programs' too

    @property
    def secret(self) -> bool:
        """Whether its value is never shown."""
        return self.kind in ("secret", "vendors")


OPTIONS = (
    Option("port", "int", 3000, "port to listen on (0: any free one)", ("PORT",), (0, 65535),
           at_start=True),
    Option("host", "host", "127.0.0.1", "address to listen on; beyond loopback is warned about",
           ("HOST",), at_start=True),
    Option("apiBase", "url", "https://api.commandcode.ai", "base URL of Command Code",
           ("COMMANDCODE_API_BASE",), at_start=True),
    Option("upstream", "choice", "alpha", "alpha: what the vendor's CLI uses; provider: the "
           "documented API, which not every plan has", (), ("alpha", "provider")),
    Option("defaultModel", "str", DEFAULT_MODEL,
           'model for requests that name none, or "default"', ("COMMANDCODE_DEFAULT_MODEL",)),
    Option("modelAliases", "map", {}, "names of your own for models; * stands for anything "
           "(claude-*=moonshotai/Kimi-K3)"),
    Option("allowedModels", "list", [], "if set, only these models are served",
           ("COMMANDCODE_ALLOWED_MODELS",)),
    Option("allowUnknownModels", "bool", True, "pass on model ids that the catalogue lacks",
           ("COMMANDCODE_ALLOW_UNKNOWN_MODELS",)),
    Option("models", "models", [], "models that are switched off here, as {id, enabled} (or: "
           "opus=off,gpt-6-sol=off)"),
    Option("useProviderModels", "bool", True, "ask the upstream for its list of models"),
    Option("modelRefreshIntervalMs", "int", 3_600_000, "how old that list may become, in ms",
           (), (1000, 7 * 86_400_000)),
    Option("includeReasoning", "bool", True, "show thinking as reasoning_content in Chat "
           "Completions", ("INCLUDE_REASONING",)),
    Option("emptyResponsePolicy", "choice", "error_on_length", "an answer cut by length before "
           "anything was shown: an error, or an empty success",
           ("COMMANDCODE_EMPTY_VISIBLE_RESPONSE_POLICY",), ("error_on_length", "allow")),
    Option("corsOrigin", "str", "", "origin that browsers may call from (*: any; several: with "
           "commas); unset: none", ("CORS_ORIGIN",)),
    Option("maxBodyBytes", "int", 64 * MIB, "largest request body, also after decompression",
           ("REQUEST_BODY_LIMIT_BYTES",), (1024, 1024 * MIB)),
    Option("maxConnections", "int", 4096, "client connections at once; more get a 503", (),
           (1, 1_000_000)),
    Option("upstreamConnectSeconds", "seconds", 10, "time to connect to the upstream", (),
           (0.01, 3600)),
    Option("upstreamIdleSeconds", "seconds", 300, "an upstream silent for this long is given up",
           ("COMMANDCODE_TIMEOUT_MS",), (0.01, 86_400)),
    Option("drainSeconds", "seconds", 30, "how long running answers may go on after SIGTERM", (),
           (0, 86_400)),
    Option("drainDelaySeconds", "seconds", 0, "how long after SIGTERM requests are still taken, "
           "while /health says 503", (), (0, 3600)),
    Option("routingPolicy", "choice", "daily_burn_priority", "which key of a ring serves "
           "(depletion_aware: daily_burn_priority)", ("COMMANDCODE_ROUTING_POLICY",),
           ("daily_burn_priority", "depletion_aware", "balance_priority", "round_robin",
            "drain_first")),
    Option("fallbackPolicy", "choice", "round_robin", "the same where account figures are "
           "missing", ("COMMANDCODE_FALLBACK_POLICY",), ("round_robin", "drain_first")),
    Option("maxInFlightPerKey", "int", 0, "requests at once on one key (0: 4 in a ring while "
           "another key is free, any number on a single key)",
           ("COMMANDCODE_MAX_IN_FLIGHT_PER_CREDENTIAL",), (0, 100_000)),
    Option("maxTotalInFlight", "int", 0, "requests at once in all (0: any number); more get a "
           "503", ("COMMANDCODE_MAX_TOTAL_IN_FLIGHT", MULTIPLIER), (0, 1_000_000)),
    Option("keyCooldownSeconds", "seconds", 60, "how long a key of a ring is passed over after "
           "429, 5xx or a timeout", ("COMMANDCODE_CREDENTIAL_COOLDOWN_MS",), (0, 86_400)),
    Option("accountRefreshSeconds", "seconds", 300, "how old a ring's account figures may "
           "become", ("COMMANDCODE_BILLING_REFRESH_MS",), (10, 86_400)),
    Option("accountTimeoutSeconds", "seconds", 10, "time to ask for an account's figures",
           ("COMMANDCODE_BILLING_TIMEOUT_MS",), (0.01, 600)),
    Option("clientKey", "secret", "", "callers that present this use the operator's keys",
           ("BRIDGE_API_KEY", "BRIDGE_BEARER")),
    Option("operatorKeys", "choice", "off", "loopback: without a clientKey, callers on this "
           "machine use the operator's keys", (), ("off", "loopback")),
    Option("credentialsFile", "str", "", "JSON file of the operator's keys, mode 0600",
           ("COMMANDCODE_CREDENTIALS_FILE",)),
    Option("minCurrentBalance", "number", 0, "alert when the account of an operator's key holds "
           "less (USD; 0: no alert)",
           ("COMMANDCODE_BALANCE_ALERT_MIN_CURRENT_BALANCE", ALERT_SWITCH), (0, 1_000_000)),
    Option("minExpiringBalance", "number", 0, "alert when less of it is left that expires (USD)",
           ("COMMANDCODE_BALANCE_ALERT_MIN_EXPIRING_BALANCE",), (0, 1_000_000)),
    Option("maxRequiredDailyBurn", "number", 0, "alert when more must be spent a day, or credit "
           "expires (USD)", ("COMMANDCODE_BALANCE_ALERT_MAX_REQUIRED_DAILY_BURN",),
           (0, 1_000_000)),
    Option("accountAlerts", "bool", True, "alert when an operator's key is refused, and when none "
           "of them is usable"),
    Option("windowAlert", "number", 90, "alert from this percentage of a usage window on that an "
           "operator's account has used (0: no alert)", (), (0, 100)),
    Option("windowAlertEnd", "number", 80, "below this percentage that alert is over", (),
           (0, 100)),
    Option("errorRateAlert", "number", 50, "alert from this percentage of requests on that fail "
           "(0: no alert)", (), (0, 100)),
    Option("errorRateAlertEnd", "number", 25, "below this percentage that alert is over", (),
           (0, 100)),
    Option("errorRateAlertRequests", "number", 20, "how many requests such an alert takes", (),
           (1, 500)),
    Option("errorRateAlertSeconds", "seconds", 300, "the time in which they are counted", (),
           (1, 3600)),
    Option("alertIntervalSeconds", "seconds", 300, "how often accounts are asked for alerts",
           ("COMMANDCODE_BALANCE_ALERT_INTERVAL_MS",), (10, 86_400)),
    Option("alertRepeatSeconds", "seconds", 21_600, "how often an alert that stands is told again "
           "(0: never)", ("COMMANDCODE_BALANCE_ALERT_REPEAT_MS",), (0, 30 * 86_400)),
    Option("alertWebhookUrl", "secret", "", "where alerts are posted as JSON; kept secret, as it "
           "may hold one", ("COMMANDCODE_BALANCE_ALERT_WEBHOOK_URL",), ("http://", "https://")),
    Option("alertWebhookToken", "secret", "", "sent there as Authorization: Bearer",
           ("COMMANDCODE_BALANCE_ALERT_WEBHOOK_BEARER",)),
    Option("rateLimitMax", "int", 0, "POST requests of one caller per rateLimitWindow (0: any "
           "number); more get a 429", ("RATE_LIMIT_MAX",), (0, 1_000_000)),
    Option("rateLimitWindow", "seconds", 60, "that window", ("RATE_LIMIT_WINDOW",), (1, 86_400)),
    Option("projectSlug", "str", "project", "x-project-slug sent upstream", ("PROJECT_SLUG",)),
    Option("cliVersion", "str", DEFAULT_CLI_VERSION, "x-command-code-version sent upstream; auto: "
           "ask an installed npm once a day", ("COMMANDCODE_CLI_VERSION",)),
    Option("logLevel", "choice", "info", "least level that is logged", ("LOG_LEVEL",), LOG_LEVELS),
    Option("logFile", "str", "", "log to this file instead of standard error", ("LOG_FILE",),
           at_start=True),
    Option("backends", "list", [], "what answers besides Command Code: openai, anthropic, "
           "moonshot, zai, passthrough (each of these that has a key), or names of vendors",
           ("BRIDGE_BACKENDS",), at_start=True),
    Option("openaiKey", "secret", "", "the operator's key for OpenAI", ("OPENAI_API_KEY",),
           at_start=True, lent=True),
    Option("anthropicKey", "secret", "", "the operator's key for Anthropic",
           ("ANTHROPIC_API_KEY",), at_start=True, lent=True),
    Option("moonshotKey", "secret", "", "the operator's key for Moonshot", ("MOONSHOT_API_KEY",),
           at_start=True, lent=True),
    Option("zaiKey", "secret", "", "the operator's key for Z.ai", ("ZAI_API_KEY",),
           at_start=True, lent=True),
    Option("vendorBases", "map", {}, "other addresses of vendors, with the version path, such as "
           "openai=http://127.0.0.1:9/v1", at_start=True),
    Option("vendors", "vendors", {}, "further APIs by name: {NAME: {base, format: openai or "
           "anthropic, key or keyEnv, models, insecure}}", at_start=True),
    Option("adminKey", "secret", "", "what /admin wants for changes, and for reading from "
           "another machine"),
    Option("usageDb", "str", "", "SQLite file that keeps a record of every request, without its "
           "contents (auto: in the state folder)", at_start=True),
    Option("usageDays", "int", 90, "how long it keeps them", (), (1, 36_500)),
)

# Where vendors' APIs are, and which format they speak.
VENDORS = {"openai": ("https://api.openai.com/v1", "openai"),
           "anthropic": ("https://api.anthropic.com/v1", "anthropic"),
           "moonshot": ("https://api.moonshot.ai/v1", "openai"),
           "zai": ("https://api.z.ai/api/paas/v4", "openai")}
RESERVED_NAMES = {*VENDORS, *"commandcode chatgpt bridge passthrough claude claudish codex "
                  "opencode kimi amp factory forge".split()}
# Options of earlier versions: `help` says what to do instead.  A source that still sets one gets
# a warning, whatever the value is.
REMOVED_OPTIONS = (Option("workers", "removed", None, "see README, several processes"),)


def read_variable(option: Option, name: str, environment: Mapping[str, str]) -> Optional[str]:
    """An environment variable's text, with its unit if that is not the option's; None where it does
    not count: unset, empty, or of commandcode-bridge's alerts where those are switched off."""
    text = environment.get(name)
    switch = environment.get(ALERT_SWITCH, "") if name.startswith(ALERT_VARIABLES) else ""
    if not text or BOOLEAN_WORDS.get(switch.lower()) is False:
        return None
    if name == ALERT_SWITCH and text.lower() in BOOLEAN_WORDS:
        return "1"              # the limit that they have where no other is set
    is_bare = re.fullmatch(r"seconds \w+_MS *[0-9.]+ *", "%s %s %s" % (option.kind, name, text))
    return text.strip() + "ms" if is_bare else text


# === CONFIG (pure) ==========================================================
# Options read from flags, the environment and the file, all given as dicts, in
# this order; reading the file itself is the command line's work.  Nothing here
# knows an option by name.


def snake_case(name: str) -> str:
    return re.sub(r"[A-Z]", lambda letter: "_" + letter[0].lower(), name)


def flag_name(option: Option) -> str:
    return "--" + snake_case(option.name).replace("_", "-")


def environment_names(option: Option) -> Tuple[str, ...]:
    return ("CC_" + snake_case(option.name).upper(),) + option.env


# One attribute per option, in snake case: config.api_base.  Built from the rows, so that
# a new option is a new row and nothing else.
Config = namedtuple("Config", [snake_case(option.name) for option in OPTIONS])  # type: ignore


class Origin(NamedTuple):
    """Where an upstream is: `host` without brackets, `base` the path before every request's."""

    scheme: str
    host: str
    port: int
    base: str

    @property
    def authority(self) -> str:
        host = bracketed(self.host)
        default = 443 if self.scheme == "https" else 80
        return host if self.port == default else "%s:%d" % (host, self.port)


def parse_origin(url: str) -> Origin:
    """Origin of an http(s) base URL.  Raises ValueError that says what is wrong with it."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an http:// or https:// URL")
    if "@" in parts.netloc or parts.query or parts.fragment or re.search(r"[^!-~]", url):
        raise ValueError("must hold only scheme, host, port and path")
    port = parts.port or (443 if parts.scheme == "https" else 80)     # raises ValueError too
    return Origin(parts.scheme, parts.hostname, port, parts.path.rstrip("/"))


def bracketed(host: str) -> str:
    """A host as it stands in a URL."""
    return "[%s]" % host if ":" in host else host


LOOPBACK = re.compile(r"localhost|127(\.[0-9]{1,3}){3}|\[?::1\]?|::ffff:127(\.[0-9]{1,3}){3}", re.I)
MODEL_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/+~\[\]-]{0,199}")     # of a backend's model id
BRIDGE = re.compile(r"\Abridge/", re.I)


def local_address(host: str, port: int) -> str:
    """The address at which programs of this machine reach a proxy that listens there; its port is
    PORT where any free one will do."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return "http://%s:%s" % (bracketed(host), port or "PORT")


def read_span(given: str) -> Any:
    """Seconds of `1 minute`, `1.5h`, `500 ms`, as other bridges write spans; else as it is."""
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?) *([a-z]{1,12})", given.strip().lower())
    return next((round(float(found[1]) * seconds, 9) for words, seconds in SPAN_UNITS.items()
                 if re.fullmatch(words, found[2])), given) if found else given


def read_number(option: Option, given: Any) -> Any:
    """An int or a span of seconds within the option's bounds."""
    convert = int if option.kind == "int" else float
    if isinstance(given, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?", given, re.ASCII):
        given = float(given) if "." in given else int(given)
    elif isinstance(given, str) and option.kind == "seconds":
        given = read_span(given)
    least, most = option.choices
    if isinstance(given, bool) or not isinstance(given, (int, float)):
        raise ValueError("must be a number")
    if not least <= given <= most:
        raise ValueError("must be from %s to %s" % (least, most))
    if convert(given) != given:
        raise ValueError("must be a whole number")
    return convert(given)


def read_boolean(option: Option, given: Any) -> bool:
    value = BOOLEAN_WORDS.get(given.lower()) if isinstance(given, str) else given
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def read_string(option: Option, given: Any) -> str:
    if not isinstance(given, str):
        raise ValueError("must be a string")
    if re.search(r"[\x00-\x1f\x7f]", given):
        raise ValueError("must not hold control characters")
    return given.strip()


def read_secret(option: Option, given: Any) -> str:
    """Visible ASCII, for it goes into a header; with choices, a URL that begins with one of them.
    What is wrong is told without the value."""
    if option.lent and isinstance(given, str):
        return given.strip()        # checked where it is used
    value = read_string(option, given)
    if not re.fullmatch("[!-~]*", value):
        raise ValueError("must be of visible ASCII characters")
    if value and option.choices:
        if not value.lower().startswith(option.choices):
            raise ValueError("must begin with " + " or ".join(option.choices))
        try:
            parts = urlsplit(value)
            usable = parts.hostname and parts.port != 0 and "@" not in parts.netloc
        except ValueError:
            usable = None
        if not usable:
            raise ValueError("must be a URL with a host, and without a user name")
    return value


def read_host(option: Option, given: Any) -> str:
    value = read_string(option, given)
    if not re.fullmatch(r"[^\s/]+", value):
        raise ValueError("must be an address or a host name")
    return value


def read_choice(option: Option, given: Any) -> str:
    value = read_string(option, given).lower()
    value = OTHER_LEVELS.get(value, value)
    if value not in option.choices:
        raise ValueError("must be one of: " + ", ".join(option.choices))
    return value


def read_url(option: Option, given: Any) -> str:
    value = read_string(option, given)
    parse_origin(value)
    return value.rstrip("/")


def read_list(option: Option, given: Any) -> List[str]:
    values = given.split(",") if isinstance(given, str) else given
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("must be a list of strings (or names with commas between them)")
    return [value.strip() for value in values if value.strip()]


def read_map(option: Option, given: Any) -> Dict[str, str]:
    """An object of strings; from a flag or the environment also `a=b,c=d`."""
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            given = json.loads(given)
        except ValueError:
            raise ValueError("must be a JSON object, or names as a=b,c=d") from None
    elif isinstance(given, str):
        pairs = [pair.partition("=") for pair in given.split(",") if pair.strip()]
        given = {name.strip(): value.strip() for name, _, value in pairs}
    if not isinstance(given, dict) or not all(
            isinstance(value, str) and value and name for name, value in given.items()):
        raise ValueError('must be an object of strings, like {"claude-*": "moonshotai/Kimi-K3"}')
    return given


def split_switches(given: str) -> List[Json]:
    """Switches written as `one=off,other=on`."""
    pairs = [pair.rpartition("=") for pair in given.split(",") if pair.strip()]
    return [{"id": name.strip(), "enabled": BOOLEAN_WORDS.get(word.strip().lower())}
            for name, _, word in pairs]


def read_switches(option: Option, given: Any) -> List[Json]:
    """A list of {"id", "enabled"}; from a flag or the environment also `one=off,other=on`."""
    if isinstance(given, str) and given.lstrip().startswith("["):
        try:
            given = json.loads(given)
        except ValueError:
            raise ValueError("must be a JSON list, or names as a=off,b=on") from None
    elif isinstance(given, str):
        given = split_switches(given)
    if not isinstance(given, list) or not all(isinstance(row, dict) for row in given):
        raise ValueError('must be a list like [{"id": "gpt-6-sol", "enabled": false}]')
    seen: Set[str] = set()
    for number, row in enumerate(given, 1):
        name = row.get("id")
        if set(row) != {"id", "enabled"} or not isinstance(row["enabled"], bool):
            raise ValueError("entry %d must have an id and enabled (true or false), no more"
                             % number)
        if not isinstance(name, str) or not re.fullmatch(r"[!-~]{1,200}", name):
            raise ValueError("entry %d must have an id of 1 to 200 ASCII characters without spaces"
                             % number)
        if name.lower() in seen:
            raise ValueError("entry %d names a model a second time" % number)
        seen.add(name.lower())
    return given


# Members of a vendor of the option `vendors`: what each must be.
VENDOR_MEMBERS: Dict[str, Tuple[Callable[[Any], bool], str]] = {
    "base": (lambda value: bool(parse_origin(value)), "an http:// or https:// URL"),
    "format": (lambda value: value in ("openai", "anthropic"), "openai or anthropic"),
    "key": (lambda value: re.fullmatch("[!-~]+", value) is not None, "visible ASCII characters"),
    "keyEnv": (lambda value: re.fullmatch(r"\w+", value) is not None, "a variable's name"),
    "models": (lambda value: isinstance(value, list) and all(
        isinstance(one, str) and MODEL_PART.fullmatch(one) for one in value), "a list of ids"),
    "insecure": (lambda value: isinstance(value, bool), "true or false")}


def check_vendor(name: str, row: Any) -> None:
    """Raise ValueError for what cannot be a vendor's name or row."""
    if not re.fullmatch("[a-z0-9-]{1,32}", name) or name in RESERVED_NAMES:
        raise ValueError("%s must be another name: of a-z, 0-9 and -, and not a backend's own"
                         % json.dumps(name[:40]))
    if not isinstance(row, dict) or not set(row) <= set(VENDOR_MEMBERS):
        raise ValueError("%s must be an object with no more members than %s"
                         % (name, ", ".join(VENDOR_MEMBERS)))
    if "base" not in row or "format" not in row or ("key" in row) == ("keyEnv" in row):
        raise ValueError("%s must have base, format, and either key or keyEnv" % name)
    for member, value in row.items():
        fits, words = VENDOR_MEMBERS[member]
        try:
            sound = fits(value)
        except (TypeError, ValueError, AttributeError):
            sound = False
        if not sound:
            raise ValueError("%s.%s must be %s" % (name, member, words))


def read_vendors(option: Option, given: Any) -> Dict[str, Json]:
    """Vendors' rows by name; from a flag or the environment as JSON.  What is wrong is told
    without the values, among which are keys."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise ValueError("must be a JSON object") from None
    if not isinstance(given, dict):
        raise ValueError("must be an object of vendors by name")
    for name, row in given.items():
        check_vendor(name, row)
    return given


VALUE_READERS: Dict[str, Callable[[Option, Any], Any]] = {
    "secret": read_secret, "int": read_number, "seconds": read_number, "number": read_number,
    "bool": read_boolean, "str": read_string,
    "host": read_host,
    "choice": read_choice, "url": read_url, "list": read_list, "map": read_map,
    "models": read_switches, "vendors": read_vendors}


def read_value(option: Option, given: Any, source: str) -> Any:
    """A given value as the option's own type.  Raises ProxyError `config` naming the source."""
    try:
        return VALUE_READERS[option.kind](option, given)
    except RecursionError:
        raise ProxyError("config", "%s: %s is nested too deeply" % (source, option.name),
                         param=option.name) from None
    except ValueError as error:
        text = json.dumps(given)
        text = text if len(text) <= 100 else re.sub(r"[\w-]*\Z", "...", text[:100])    # no cut key
        shown = "" if option.secret else " (it is %s)" % text
        raise ProxyError("config", "%s: %s %s%s" % (source, option.name, error, shown),
                         param=option.name) from None


def check_entries(entries: Mapping[str, Any], file_name: str) -> None:
    """Refuse a config file's entries that name no option, or say nothing about one."""
    removed = {option.name for option in REMOVED_OPTIONS}
    unknown = sorted(set(entries) - removed - {option.name for option in OPTIONS})
    if unknown:
        import difflib
        near = difflib.get_close_matches(unknown[0][:50], [option.name for option in OPTIONS], 1)
        raise ProxyError("config", "%s: unknown option %s %s(--help-all lists them)" % (
            file_name, ", ".join(unknown), "- did you mean %s? " % near[0] if near else ""),
            param=unknown[0])
    empty = [name for name, value in entries.items() if value is None and name not in removed]
    if empty:
        raise ProxyError("config", "%s: %s must not be null (leave it out)"
                         % (file_name, empty[0]), param=empty[0])


def removed_warnings(flags: Mapping[str, str], environment: Mapping[str, str],
                     entries: Mapping[str, Any]) -> Tuple[str, ...]:
    """One warning for each removed option that any of the sources still sets."""
    return tuple("%s was removed: %s" % (option.name, option.help) for option in REMOVED_OPTIONS
                 if option.name in flags or option.name in entries
                 or any(map(environment.get, environment_names(option))))


def variable_warnings(environment: Iterable[str]) -> List[str]:
    """A warning for each variable CC_... that is no option's but is spelled much like one's."""
    names = set().union(*map(environment_names, (*OPTIONS, *REMOVED_OPTIONS)))
    unknown = [name for name in environment if name.startswith("CC_") and name not in names]
    if not unknown:
        return []               # nearly always
    import difflib
    near = [(name, difflib.get_close_matches(name[:100], names, 1, 0.8)) for name in unknown]
    return ["environment %s is not an option (did you mean %s?)" % (json.dumps(name)[1:-1][:100],
                                                                   found[0])
            for name, found in near if found]


def read_config(flags: Mapping[str, str], environment: Mapping[str, str],
                entries: Mapping[str, Any], file_name: str) -> Tuple[Config, Dict[str, str]]:
    """The configuration in effect, and for each option the source that gave it.

    The order is flags (by option name), environment, entries of the file, defaults.  An empty
    environment variable counts as unset.  Raises ProxyError of kind `config`.
    """
    check_entries(entries, file_name)
    values, sources = {}, {}
    for option in OPTIONS:
        places = [(flag_name(option), flags.get(option.name))]
        places += [("environment " + name, read_variable(option, name, environment))
                   for name in environment_names(option)]
        places.append((file_name, entries.get(option.name)))
        source, given = next(((where, value) for where, value in places if value is not None),
                             ("default", option.default))
        values[snake_case(option.name)] = read_value(option, given, source)
        sources[option.name] = source
    config = Config(**values)
    if config.cli_version != "auto" and not VERSION_PATTERN.fullmatch(config.cli_version):
        raise ProxyError("config", "%s: cliVersion must be a version such as %s, or auto"
                         % (sources["cliVersion"], DEFAULT_CLI_VERSION), param="cliVersion")
    return config, sources


# === REDACTION & LOG LINES (pure) ===========================================
# What may be shown of a secret or of what a client sent.  Two rules: `hide` takes
# out known secrets, wherever a text leaves for a client or a log; `redact` takes
# out whatever looks like a key, and is for all texts but a caller's own names of
# tools and schema members, told to that caller.  A key is shown as six hex digits
# of its SHA-256.  Log values are printable ASCII on one line, so that no client
# can forge a line or move a terminal's cursor.

KEY_SHAPE = re.compile(     # a Bearer value: but not our own `Bearer user_...`, nor prose
    r"user_[A-Za-z0-9_-]{16,}|(?<![A-Za-z0-9])(?:sk-|ccx_)[A-Za-z0-9_-]{12,}"
    r"|(?<=[Bb]earer )(?!auth|cred|key:|user_\.)[A-Za-z0-9._~+/=-]{8,}")
CUT_KEY = re.compile(r"(?:user_|sk-|ccx_)[A-Za-z0-9_-]{0,15}\Z")    # its rest was cut off
SHORT_SECRET = 8            # a shorter one is hidden only as a whole word


def key_name(key: str) -> str:
    """The only form in which a key is ever shown."""
    return "key:" + hashlib.sha256(key.encode()).hexdigest()[:6]


def percent_decoded(text: str) -> str:
    """A text without percent-encoding, however often it was encoded."""
    return unquote(re.sub("%(?:25)+(?=[0-9A-Fa-f]{2})", "%", text)) if "%" in text else text


def replace_secrets(text: str, secrets: Iterable[str]) -> str:
    """A text with other words in place of these secrets, the longest first."""
    found = sorted((one for one in secrets if one in text), key=len, reverse=True)
    shown = {one: key_name(one) if KEY_PATTERN.fullmatch(one) else "[hidden]" for one in found}
    for secret in found:
        if len(secret) >= SHORT_SECRET:
            text = text.replace(secret, shown[secret])
    short = "|".join(re.escape(one) for one in found if len(one) < SHORT_SECRET)
    if short:
        text = re.sub(r"(?<![\w-])(?:%s)(?![\w-])" % short, lambda one: shown[one[0]], text)
    return text


def hide(text: str, secrets: Iterable[str]) -> str:
    """Replace these secrets, also where they are percent-encoded."""
    if "%" not in text and not any(map(text.__contains__, secrets)):
        return text             # nearly always
    text = replace_secrets(text, secrets)
    plain = percent_decoded(text)
    shown = replace_secrets(plain, secrets)
    return text if shown == plain else shown


def conceal(value: Any, secrets: Iterable[str]) -> Any:
    """A JSON value without these secrets."""
    if isinstance(value, str):
        return replace_secrets(value, secrets)
    if isinstance(value, dict):
        return {conceal(name, secrets): conceal(one, secrets) for name, one in value.items()}
    return [conceal(one, secrets) for one in value] if isinstance(value, list) else value


def may_hold_key(text: str) -> bool:
    """Whether a text is worth a look by KEY_SHAPE: hardly any is."""
    return "user" in text or "%" in text or "sk-" in text or "ccx" in text or "earer" in text


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Replace these secrets and whatever looks like a key."""
    text = hide(text, secrets) if secrets else text
    if not may_hold_key(text):
        return text
    plain = percent_decoded(text)
    text = plain if KEY_SHAPE.search(plain) else text
    return KEY_SHAPE.sub(lambda found: key_name(found[0]), text)


def ascii_line(text: str) -> str:
    """Text as printable ASCII on one line."""
    return re.sub(r"[\x00-\x1f\x7f]", "?", text.encode("ascii", "backslashreplace").decode())


def printable(text: str, most: int) -> str:
    """Text as printable ASCII, redacted and at most so many characters."""
    if len(text) <= most and text.isascii() and text.isprintable() and not may_hold_key(text):
        return text             # nearly always: several in each request's record and log line
    whole = text if len(text) <= 4 * most else CUT_KEY.sub("", text[:4 * most])
    shown = ascii_line(redact(whole))
    return shown if len(shown) <= most else shown[:most - 3] + "..."


def own_words(text: str, most: int) -> str:
    """The same for words of the caller's that go back to it: redacted only where they are cut, for
    no key may be cut in two."""
    if len(text) <= most and text.isascii() and text.isprintable():
        return text
    shown = ascii_line(text[:most + 1])
    return shown if len(shown) <= most else printable(text, most)


BARE_VALUE = re.compile(r"[^\s\"=;]+")         # stands in a log line without quotes


def log_value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "%.3f" % value
    text = printable(str(value), MAX_LOG_VALUE)
    return text if BARE_VALUE.fullmatch(text) else json.dumps(text)


def log_line(fields: Mapping[str, Any]) -> str:
    """One request as `name=value ...`; what is None or empty is left out."""
    return " ".join("%s=%s" % (name, log_value(value)) for name, value in fields.items()
                    if value is not None and value != "")


def add_note(notes: List[str], code: str, detail: str) -> None:
    """Remember something that was dropped, clamped or changed, as `code=detail`; what repeats
    itself, as a flood of bad lines would, once."""
    note = "%s=%s" % (code, own_words(detail, 120).replace(";", ","))
    if notes[-1:] != [note]:
        notes.append(note)


def format_notes(notes: Iterable[str]) -> str:
    """Value of x-ccproxy-notes: each note once, `; ` between, at most MAX_NOTE_BYTES."""
    unique = list(dict.fromkeys(notes))
    if not unique:
        return ""               # nearly always
    shown, size = [], 0
    for note in unique:
        size += len(note) + 2
        if size > MAX_NOTE_BYTES - 16:      # room for the last words
            break
        shown.append(note)
    if len(shown) < len(unique):
        shown.append("+%d more" % (len(unique) - len(shown)))
    return "; ".join(shown)


# === PART: HTTP (pure) ======================================================
# === HTTP WIRE (pure) =======================================================
# HTTP/1.1 by hand (RFC 9110, 9112): heads and body framing of both directions,
# on bytes with explicit ASCII classes.  Strict, so that no two parties can see
# different messages in the same bytes: a framing error is one answer and the end of
# the connection.  Whoever calls says with `fault` whose fault a malformed message
# is: a client's (400) or the upstream's (502).  HTTP/2, trailers' contents and
# ranges are left out on purpose.

Fault = Callable[..., ProxyError]   # of a message, and what a client is told instead, if anything
Fields = Dict[str, str]             # lower-case name to value; repeated ones joined by ", "

REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([!-~]+) HTTP/([0-9])\.([0-9])")
STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [\t -~\x80-\xff]*)?")
FIELD_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)")
BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n)(?!\Z)")
HOST_VALUE = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]+)(:[0-9]{0,5})?")
ABSOLUTE_TARGET = re.compile(r"(?i:https?)://([^/?#]*)(.*)")
SHORT_SIZES = {b"%x" % size: size for size in range(1, 1024)}     # read without a pattern
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})[\t ]*(?:;[\t -~\x80-\xff]*)?\r\n")

REASONS = {100: "Continue", 200: "OK", 201: "Created", 202: "Accepted", 204: "No Content",
           400: "Bad Request", 401: "Unauthorized", 402: "Payment Required", 403: "Forbidden",
           404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout", 409: "Conflict",
           411: "Length Required", 413: "Content Too Large", 414: "URI Too Long",
           415: "Unsupported Media Type", 417: "Expectation Failed", 422: "Unprocessable Content",
           426: "Upgrade Required", 429: "Too Many Requests",
           431: "Request Header Fields Too Large", 500: "Internal Server Error",
           501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable",
           504: "Gateway Timeout", 505: "HTTP Version Not Supported", 529: "Overloaded"}


class Framing(NamedTuple):
    """How a body ends: `chunked`, after `length` bytes, or (`length` None) with the connection."""

    chunked: bool
    length: Optional[int]


class RequestHead(NamedTuple):
    """A request without its body.  `path` is the target without its query, still encoded."""

    method: str
    target: str
    path: str
    minor: int                      # of HTTP/1.x
    fields: Fields
    framing: Framing
    keep_alive: bool


class ResponseHead(NamedTuple):
    """An upstream's answer without its body."""

    status: int
    fields: Fields
    framing: Framing
    keep_alive: bool


def client_fault(message: str, refusal: Optional[ProxyError] = None) -> ProxyError:
    return refusal or ProxyError("invalid", "Malformed HTTP request: " + redact(message))


def upstream_fault(message: str, refusal: Optional[ProxyError] = None) -> ProxyError:
    return ProxyError("upstream", "The upstream sent malformed HTTP: " + redact(message))


def too_large(most: int) -> ProxyError:
    return ProxyError("too_large", "The request body is larger than %d bytes (maxBodyBytes)."
                      % most)


def find_head_end(data: Union[bytes, bytearray], start: int, fault: Fault) -> int:
    """Index behind the empty line that ends a head, -1 when it is not there yet.  `start` is where
    looking begins, so that a head in many pieces costs linear time.  Raises what `fault` makes of
    a line end that is not CRLF and of a head that is too long."""
    end = data.find(b"\r\n\r\n", max(0, start - 3))
    stop = len(data) if end < 0 else end + 4
    begin = max(0, start - 1)
    ends = data.count(b"\r\n", begin, stop)       # counting is 20 times as fast as the pattern
    if (data.count(b"\n", begin, stop) != ends or data.count(b"\r", begin, stop) != ends) and \
            BARE_LINE_END.search(data, begin, stop):
        raise fault("a line must end with CR LF, not with a bare CR or LF")
    if stop > MAX_HEAD_BYTES:
        raise fault("endless head", ProxyError("head_too_large", "The head of the request is "
                                               "longer than %d bytes." % MAX_HEAD_BYTES))
    return -1 if end < 0 else stop


def parse_fields(data: bytes, fault: Fault) -> List[Tuple[str, str]]:
    """Header or trailer lines as (lower-case name, value) pairs, in order (RFC 9112 5)."""
    lines = data.decode("latin-1").split("\r\n") if data else []
    if len(lines) > MAX_HEAD_FIELDS:
        raise fault("too many header fields", ProxyError(
            "head_too_large", "More than %d header fields." % MAX_HEAD_FIELDS))
    pairs = []
    for line in lines:
        found = FIELD_LINE.fullmatch(line)
        if not found:
            raise fault("header line %d is not `name: value`" % (len(pairs) + 1))
        pairs.append((intern(found[1].lower()), found[2].strip(" \t")))
    return pairs


def join_fields(pairs: List[Tuple[str, str]]) -> Fields:
    fields: Fields = {}
    for name, value in pairs:
        fields[name] = fields[name] + ", " + value if name in fields else value
    return fields


def read_length(pairs: List[Tuple[str, str]], fault: Fault) -> Optional[int]:
    """Content-Length as a number, None when absent; differing or odd ones are a fault."""
    given = {value for name, value in pairs if name == "content-length"}
    if not given:
        return None
    value = given.pop()
    if given or not (value.isascii() and value.isdigit() and len(value) <= 18):
        raise fault("Content-Length must be one decimal number")
    return int(value)


def is_chunked(pairs: List[Tuple[str, str]], fault: Fault) -> bool:
    """Whether the body is chunked; every other transfer coding is refused (RFC 9112 6.1)."""
    given = [value for name, value in pairs if name == "transfer-encoding"]
    if not given:
        return False
    codings = [coding.strip(" \t").lower() for coding in ",".join(given).split(",")]
    if codings == ["chunked"]:
        return True
    plain = all(re.fullmatch("[a-z0-9._-]+", coding) for coding in codings)
    raise fault("Transfer-Encoding must be exactly `chunked`", ProxyError(
        "not_implemented", "Transfer-Encoding: only `chunked` is understood.")
        if plain and "chunked" not in codings[:-1] else None)


def wants_keep_alive(minor: int, fields: Fields) -> bool:
    if "connection" not in fields:
        return minor > 0
    tokens = {token.strip(" \t").lower() for token in fields["connection"].split(",")}
    return "close" not in tokens and (minor > 0 or "keep-alive" in tokens)


def check_host(pairs: List[Tuple[str, str]], minor: int, authority: List[str]) -> None:
    """Exactly one well-formed Host (RFC 9112 3.2); HTTP/1.0 may lack it."""
    hosts = [value for name, value in pairs if name == "host"]
    if len(hosts) > 1 or (not hosts and minor):
        raise client_fault("there must be exactly one Host header")
    for host in hosts + authority:
        if not HOST_VALUE.fullmatch(host):
            raise client_fault("Host must be a host name and perhaps a port")


def read_target(method: str, target: str, absolute: Optional["re.Match[str]"]) -> str:
    """The path and query of a target.  Raises ProxyError for a target in none of the forms of
    RFC 9112 3.2; CONNECT is refused behind this, whatever its target."""
    if absolute:
        return absolute[2] if absolute[2].startswith("/") else "/" + absolute[2]
    if not (target.startswith("/") or method == "CONNECT" or (method, target) == ("OPTIONS", "*")):
        raise client_fault("the target must be a path or an http URL")
    return target


def parse_request_head(data: bytes) -> RequestHead:
    """Head of a client's request, given with its empty line and without leading CRLFs.  Raises
    ProxyError: 400, 414, 417, 431, 501 or 505, always the end of the connection."""
    line, _, rest = data[:-4].partition(b"\r\n")
    if len(line) > MAX_REQUEST_LINE_BYTES:
        raise ProxyError("target_too_long", "The request line is longer than %d bytes."
                         % MAX_REQUEST_LINE_BYTES)
    found = REQUEST_LINE.fullmatch(line)
    if not found:
        raise client_fault("the first line is not a request line")
    if found[3] != b"1":
        raise ProxyError("http_version", "Only HTTP/1.1 and HTTP/1.0 are spoken here.")
    method, target, minor = found[1].decode(), found[2].decode(), min(int(found[4]), 1)
    pairs = parse_fields(rest, client_fault)
    absolute = ABSOLUTE_TARGET.fullmatch(target)
    check_host(pairs, minor, [absolute[1]] if absolute else [])
    fields = join_fields(pairs)
    length, chunked = read_length(pairs, client_fault), is_chunked(pairs, client_fault)
    if chunked and (length is not None or not minor):
        raise client_fault("Transfer-Encoding goes neither with Content-Length nor with HTTP/1.0")
    if minor and fields.get("expect", "100-continue").lower() != "100-continue":
        raise ProxyError("expectation", "Expect: only 100-continue is understood.")
    path = read_target(method, target, absolute)
    if absolute:
        fields["host"] = absolute[1]        # which counts, whatever Host says (RFC 9112 3.2.2)
    return RequestHead(method, target, path.partition("?")[0], minor, fields,
                       Framing(chunked, length or 0), wants_keep_alive(minor, fields))


def parse_response_head(data: bytes) -> ResponseHead:
    """Head of an upstream's answer, given with its empty line.  Raises ProxyError `upstream`."""
    line, _, rest = data[:-4].partition(b"\r\n")
    found = STATUS_LINE.fullmatch(line)
    if not found:
        raise upstream_fault("the first line is not a status line")
    minor, status = int(found[1]), int(found[2])
    pairs = parse_fields(rest, upstream_fault)
    fields = join_fields(pairs)
    chunked, length = is_chunked(pairs, upstream_fault), read_length(pairs, upstream_fault)
    if status < 200 or status in (204, 304):
        chunked, length = False, 0
    framing = Framing(chunked, None if chunked else length)
    # Only where both sides must agree on where the answer ends (RFC 9112 6.3).
    certain = chunked == (length is None) and (minor > 0 or not chunked)
    keep_alive = certain and wants_keep_alive(minor, fields)
    return ResponseHead(status, fields, framing, keep_alive)


class ChunkedBody:
    """Takes the chunked coding off (RFC 9112 7.1).  `feed(data)` gives the content that is complete
    so far.  Once `done`, `rest` holds what came behind the body.  Trailers are checked and dropped,
    never merged into the head.  A fault behind good content is in `broken`, so that no cut of the
    bytes changes what is read before it."""

    __slots__ = ("fault", "tail", "left", "done", "rest", "spent", "carried", "trailers", "broken")

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.tail = b""             # a line that is not whole yet
        self.left = -2              # of the chunk and its CRLF; -2: a size line comes next
        self.done = False
        self.rest = b""
        self.spent = self.carried = 0       # bytes of framing, bytes of content
        self.trailers = -1          # lines of them read; -1: still in the chunks
        self.broken: Optional[ProxyError] = None

    def feed(self, data: bytes) -> bytes:
        if self.tail:
            data, self.tail = self.tail + data, b""
        elif self.left == -2 and self.trailers < 0:
            content = self.only_chunk(data)
            if content:
                return content
        pieces: List[bytes] = []
        at, end = 0, len(data)
        try:
            while at < end and not self.done and not self.tail:
                if self.left != -2:
                    at = self.read_content(data, at, pieces)
                elif self.trailers < 0:
                    at = self.read_chunk(data, at, pieces)
                else:
                    at = self.read_trailer(data, at)
        except ProxyError as error:
            if not pieces:
                raise
            self.broken = error
        if self.done:
            self.rest = data[at:]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def only_chunk(self, data: bytes) -> bytes:
        """The content of a read that is one short chunk, as most reads are; else b""."""
        end = data.find(b"\r\n", 0, 5)
        size = SHORT_SIZES.get(data[:end])
        if size is None or len(data) != end + size + 4 or data[-2:] != b"\r\n":
            return b""
        self.carried += size
        self.spent += end + 4
        return data[end + 2:-2]

    def read_chunk(self, data: bytes, at: int, pieces: List[bytes]) -> int:
        """Read a size line, and the whole chunk where all of it is here."""
        found = CHUNK_LINE.match(data, at)
        if not found:
            if b"\n" in data[at:at + MAX_CHUNK_LINE_BYTES] or len(data) - at > MAX_CHUNK_LINE_BYTES:
                raise self.fault("bad chunk size line")
            self.tail = data[at:]
            return len(data)
        size, start = int(found[1], 16), found.end()
        stop = start + size
        self.spent += start - at + 2
        if start - at > MAX_CHUNK_LINE_BYTES:
            raise self.fault("a chunk size line longer than %d bytes" % MAX_CHUNK_LINE_BYTES)
        if self.spent > CHUNK_OVERHEAD_BYTES and \
                self.spent > CHUNK_OVERHEAD_FACTOR * self.carried + CHUNK_OVERHEAD_BYTES:
            raise self.fault("chunks with more framing than content")
        if size and data[stop:stop + 2] == b"\r\n":
            pieces.append(data[start:stop])
            self.carried += size
            return stop + 2
        if size:
            self.left = size
        else:
            self.trailers = self.spent = 0
        return start

    def read_content(self, data: bytes, at: int, pieces: List[bytes]) -> int:
        """Read what there is of a chunk and of the CRLF behind it."""
        if self.left > 0:
            piece = data[at:at + self.left]
            pieces.append(piece)
            self.left -= len(piece)
            self.carried += len(piece)
            at += len(piece)
            if self.left:
                return at
        end = data[at:at + 2]
        if not b"\r\n".startswith(end):
            raise self.fault("a chunk must end with CR LF")
        if len(end) < 2:
            self.tail = end
            return len(data)
        self.left = -2
        return at + 2

    def read_trailer(self, data: bytes, at: int) -> int:
        """Read one trailer line or the empty line that ends the body."""
        end = data.find(b"\n", at)
        size = len(data) - at if end < 0 else end + 1 - at
        if self.spent + size > MAX_HEAD_BYTES:
            raise self.fault("trailers too long")
        if end < 0:
            self.tail = data[at:]
            return len(data)
        self.spent += size
        if data[end - 1:end] != b"\r" or end == at:
            raise self.fault("a trailer line must end with CR LF")
        if end - 1 == at:
            self.done = True
            return end + 1
        parse_fields(data[at:end - 1], self.fault)
        self.trailers += 1
        if self.trailers > MAX_HEAD_FIELDS:
            raise self.fault("too many trailers")
        return end + 1

    def eof(self) -> None:
        """The connection ended: a fault unless the body had."""
        if not self.done:
            raise self.fault("the connection ended inside a chunked body")


class PlainBody:
    """A body of `length` bytes, or one that ends with the connection; the API of ChunkedBody."""

    __slots__ = ("fault", "left", "done", "rest")
    broken: Optional[ProxyError] = None         # no byte of it can be wrong

    def __init__(self, length: Optional[int], fault: Fault) -> None:
        self.fault, self.left = fault, length
        self.done, self.rest = length == 0, b""

    def feed(self, data: bytes) -> bytes:
        if self.left is None:
            return data
        content = data[:self.left]
        self.left -= len(content)
        if not self.left:
            self.done, self.rest = True, data[len(content):]
        return content

    def eof(self) -> None:
        if self.left:
            raise self.fault("the connection ended %d bytes before the body" % self.left)
        self.done = True


def head_bytes(first_line: str, fields: Iterable[Tuple[str, str]]) -> bytes:
    """A head, ready to send; what could end a line in a value becomes `?`."""
    lines = [first_line] + ["%s: %s" % pair for pair in fields]
    whole = "".join(lines)
    if not (whole.isascii() and whole.isprintable()):
        lines = [re.sub(r"[^\t -~]", "?", line) for line in lines]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


def response_head(status: int, fields: Iterable[Tuple[str, str]]) -> bytes:
    return head_bytes("HTTP/1.1 %d %s" % (status, REASONS.get(status, "Unknown")), fields)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"


# === CONTENT CODINGS (pure) =================================================
# gzip and deflate bodies of both directions, never larger than a bound when they
# are decompressed.  (zstd, which needs the system, is COMPRESSED BODIES' work.)


class InflatedBody:
    """A framed body whose content is gzip (of any number of members) or deflate; the API of
    ChunkedBody.  One `feed` gives at most `most` bytes: more is a 413, or the upstream's fault."""

    __slots__ = ("framed", "inflater", "fault", "most", "members", "done", "rest", "broken")

    def __init__(self, framed: Union[ChunkedBody, PlainBody], fault: Fault,
                 most: Optional[int] = None) -> None:
        self.framed, self.fault, self.most = framed, fault, most or MAX_INFLATED_BYTES
        self.inflater = zlib.decompressobj(47)      # gzip or zlib, told apart by its head
        self.members = 1
        self.done, self.rest, self.broken = framed.done, framed.rest, framed.broken

    def feed(self, data: bytes) -> bytes:
        framed, content = self.framed, b""
        data = framed.feed(data)
        self.done, self.rest, self.broken = framed.done, framed.rest, framed.broken
        while data:
            if self.inflater.eof:       # a further gzip member (RFC 1952 2.2)
                self.inflater = zlib.decompressobj(47)
                self.members += 1
            try:
                content += self.inflater.decompress(data, self.most + 1 - len(content))
            except zlib.error:
                raise self.fault("content that is not the gzip it says to be") from None
            if self.members > MAX_GZIP_MEMBERS:
                raise self.fault("compressed content of too many members")
            if len(content) > self.most:
                raise self.fault("compressed content that grows beyond all bounds",
                                 too_large(self.most))
            data = self.inflater.unused_data
        if self.done and not self.inflater.eof:
            raise self.fault("compressed content that is cut off")
        return content

    def eof(self) -> None:
        self.framed.eof()
        self.done = True


Body = Union[ChunkedBody, PlainBody, InflatedBody]
PLAIN_CODINGS = ("", "identity")
CODINGS = (*PLAIN_CODINGS, "gzip", "x-gzip", "deflate")


def open_body(framing: Framing, coding: str, fault: Fault, most: Optional[int] = None) -> Body:
    """The reader for a body with this framing and Content-Encoding."""
    if coding not in CODINGS:
        raise fault("Content-Encoding %s, which was not asked for" % printable(coding, 40))
    framed = ChunkedBody(fault) if framing.chunked else PlainBody(framing.length, fault)
    return framed if coding in PLAIN_CODINGS else InflatedBody(framed, fault, most)


def inflate(data: bytes, coding: str, most: int) -> bytes:
    """A whole request body without its Content-Encoding.  Raises ProxyError: 413 when it becomes
    more than `most` bytes, 415 for an unknown coding."""
    if coding not in CODINGS:
        raise ProxyError("encoding", "Content-Encoding: send the body as it is, or as gzip, "
                         "deflate or zstd.", param="content-encoding")
    if coding in PLAIN_CODINGS:
        return data             # nearly always
    return open_body(Framing(False, len(data)), coding, client_fault, most).feed(data)


# === STREAM FRAMING (pure) ==================================================
# Bytes to whole lines on the way in, JSON objects to SSE frames on the way
# out.  Lines of any length in any pieces cost linear time; a kind of line that
# nobody wants (the echo of the whole request) is dropped without being kept.


CR = ord("\r")      # looking for a byte as a number is several times as fast as for bytes


class LineBuffer:
    """Holds back the beginning of a line until its end has come.  `feed(data)` gives all lines that
    are complete, as one run of bytes that ends with a newline.  CR and CRLF become newlines, for
    each ends a line of server-sent events (WHATWG HTML 9.2.5).  A line that begins with `skip` is
    not kept: where it comes in several pieces, it is dropped."""

    __slots__ = ("skip", "pieces", "size", "skipping", "unwanted")

    def __init__(self, skip: bytes) -> None:
        self.skip = skip
        self.pieces: List[bytes] = []       # of the line that is not whole
        self.size = 0
        self.skipping = False
        self.unwanted = b"\xef\xbb\xbf"     # dropped where it comes next: a byte order mark

    def feed(self, data: bytes) -> bytes:
        if CR in data or self.unwanted:
            data = self.unify(data)
        if data[-1:] == b"\n" and not self.pieces and not self.skipping:
            return data             # nearly always
        if self.skipping:
            _, newline, data = data.partition(b"\n")
            self.skipping = not newline
        whole, end = b"", data.rfind(b"\n") + 1
        if end:
            if self.size + data.find(b"\n") > MAX_LINE_BYTES:
                raise upstream_fault("a line longer than %d bytes" % MAX_LINE_BYTES)
            whole = b"".join(self.pieces + [data[:end]])
            self.pieces, self.size, data = [], 0, data[end:]
        if data:
            self.hold(data)
        return whole

    def unify(self, data: bytes) -> bytes:
        """Data whose lines end with newlines alone, also where a CRLF comes in two pieces."""
        while data and data[:1] == self.unwanted[:1]:
            data, self.unwanted = data[1:], self.unwanted[1:]
        if data:
            self.unwanted = b"\n" if data.endswith(b"\r") else b""
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if CR in data else data

    def hold(self, data: bytes) -> None:
        """Keep the beginning of a line, unless it is one to skip."""
        self.pieces.append(data)
        self.size += len(data)
        if self.size > MAX_LINE_BYTES:
            raise upstream_fault("a line longer than %d bytes" % MAX_LINE_BYTES)
        if self.size - len(data) < len(self.skip) and b"".join(self.pieces).startswith(self.skip):
            self.pieces, self.size, self.skipping = [], 0, True

    def flush(self) -> bytes:
        """What stands behind the last newline: at the end of a stream, a line too."""
        last, self.pieces, self.size = b"".join(self.pieces), [], 0
        return last


ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False,
                           check_circular=False)


def to_json(value: Any) -> bytes:
    """Compact UTF-8 JSON, escaped as JSON.stringify does; raises ValueError for inf and nan."""
    return ENCODER.encode(value).encode("utf-8", "backslashreplace")


# Python's str.splitlines ends lines at these too, and with it httpx's iter_lines, by which
# clients read server-sent events.  JSON has them in strings alone, raw or escaped.
LINE_BREAKS = {"\u2028": "\\u2028", "\u2029": "\\u2029", "\x85": "\\u0085"}


def frame_json(value: Json) -> bytes:
    """The JSON of a frame: that of `to_json` with LINE_BREAKS escaped."""
    text = ENCODER.encode(value)
    if not text.isascii():
        for char, escape in LINE_BREAKS.items():
            text = text.replace(char, escape)
    return text.encode("utf-8", "backslashreplace")


def data_frame(value: Json) -> bytes:
    return b"data: %b\n\n" % frame_json(value)


def event_frame(name: str, value: Json) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), frame_json(value))


def comment_end(agent: str) -> bytes:
    """What ends a comment for a client with this User-Agent.  Before openai/openai-go#621, a blank
    line without data ends the stream there; naive readers of others split it at blank lines."""
    return b"\n" if "OpenAI/Go" in agent.split() else b"\n\n"


def comment_frame(text: str, end: bytes = b"\n\n") -> bytes:
    """An SSE comment: keeps a connection alive without waking the client's own watchdog."""
    return b": %b%b" % (own_words(text, 500).encode(), end)


# === JSON TEXT (pure) =======================================================
# A client's JSON made a Python object that is safe to work with: strict JSON
# (RFC 8259), an object at the top, no deeper than every Python can go, and no
# half of a surrogate pair that could not be written as UTF-8 again.


def refuse_constant(word: str) -> None:
    raise ValueError("%s is not JSON" % word)


def read_float(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError("the number %s is out of range" % text[:40])
    return value


# NaN and Infinity are not JSON; in a request, numbers beyond all floats are refused too, for they
# could not be written again.
DECODER = json.JSONDecoder(parse_constant=refuse_constant)
REQUEST_DECODER = json.JSONDecoder(parse_constant=refuse_constant, parse_float=read_float)
LOOSE_DECODER = json.JSONDecoder(parse_constant=refuse_constant, strict=False)
KNOWN_ESCAPE = r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})'
ESCAPE, ESCAPE_OR_QUOTE = re.compile(KNOWN_ESCAPE + r"|\\"), re.compile(KNOWN_ESCAPE + r'|[\\"]')
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def has_surrogates(text: str) -> bool:
    """Whether JSON text may hold an escaped surrogate (a plain search comes first: it is fast)."""
    return ("\\ud" in text or "\\uD" in text) and ESCAPED_SURROGATE.search(text) is not None


def clean_text(text: str) -> str:
    """Text with every lone surrogate made U+FFFD (json joins those that are pairs)."""
    return SURROGATE.sub("\ufffd", text) if SURROGATE.search(text) else text


def change_json(value: Any, change: Callable[[Any], Any]) -> Any:
    """A JSON value in which `change` was made of each name and of each value without members."""
    if isinstance(value, list):
        return [change_json(item, change) for item in value]
    if isinstance(value, dict):
        return {change(name): change_json(item, change) for name, item in value.items()}
    return change(value)


def clean_value(value: Any) -> Any:
    return change_json(value, lambda one: clean_text(one) if isinstance(one, str) else one)


def is_too_deep(value: Any) -> bool:
    """Whether containers stand inside one another more than MAX_JSON_DEPTH times."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [item for one in level for item in (one.values() if one.__class__ is dict else one)
                 if item.__class__ is dict or item.__class__ is list]
        if not level:
            return False
    return True


def finite_value(value: Any) -> Any:
    """A value whose infinite numbers are null: JSON has no word for them."""
    return change_json(value, lambda one: None if isinstance(one, float)
                       and one - one != 0 else one)


def escape_lone(found: Any) -> str:
    """A backslash that escapes nothing, or a bare quote, as one that stands for itself."""
    return found[0] if len(found[0]) > 1 else "\\" + found[0]


def decode_loosely(text: str) -> Any:
    """JSON as models write it: strict, or with control characters in strings and backslashes that
    escape nothing.  Raises ValueError, RecursionError."""
    try:
        return DECODER.decode(text)
    except ValueError:
        return LOOSE_DECODER.decode(ESCAPE.sub(escape_lone, text))


def decode_anyhow(text: str) -> Any:
    """JSON, also loose, with null for numbers beyond all floats; other text as it is."""
    try:
        return finite_value(decode_loosely(text))
    except (ValueError, RecursionError):
        return text


def parse_object(data: bytes, notes: List[str]) -> Json:
    """A request body as a JSON object.  Raises ProxyError `invalid` (RFC 8259)."""
    try:
        text = data.decode("utf-8-sig")
        value = REQUEST_DECODER.decode(text)
        if has_surrogates(text):
            cleaned = clean_value(value)
            if cleaned != value:
                add_note(notes, "replaced", "lone surrogates by U+FFFD")
            value = cleaned
    except UnicodeDecodeError as error:
        raise ProxyError("invalid", "The body is not UTF-8 (at byte %d)." % error.start) from None
    except json.JSONDecodeError as error:
        raise ProxyError("invalid", "The body is not JSON: %s at line %d, column %d."
                         % (error.msg, error.lineno, error.colno)) from None
    except ValueError as error:
        raise ProxyError("invalid", "The body is not JSON: %s." % str(error)[:100]) from None
    except RecursionError:
        raise ProxyError("invalid", "The body is not usable: nested too deeply.") from None
    if not isinstance(value, dict):
        raise ProxyError("invalid", "The body must be a JSON object.")
    if data.count(b"{") + data.count(b"[") > MAX_JSON_DEPTH and is_too_deep(value):
        raise ProxyError("invalid", "The body is not usable: nested too deeply.")
    return value


# === ATTACHED DATA (pure) ===================================================
# What clients attach to a message, as base64 or as a data URL (RFC 2397): read,
# healed where that is safe, its type told by its bytes, or the reason why it
# cannot be shown to a model.  Pictures are never decoded: they may be large.

DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[^;,]*)*)(;base64)?,",
                      re.ASCII | re.I)
MAX_DATA_PREFIXES = 4           # clients put one data URL into another
IMAGE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp")
# How pictures begin, as base64: an offset and the characters there.  The types that models do not
# take are here because clients label them as others.
PICTURE_BYTES = (
    (0, "iVBORw0KGgo", "image/png"), (0, "/9j/", "image/jpeg"), (0, "R0lGOD", "image/gif"),
    (12, "RUJQ", "image/webp"), (6, "Z0eX", "image/heic"), (0, "SUkqA", "image/tiff"),
    (0, "TU0AK", "image/tiff"), (0, "PHN2Zy", "image/svg+xml"), (0, "PD94bW", "text/xml"),
    (0, "JVBERi", "application/pdf"))
BASE64_TEXT = re.compile(r"[A-Za-z0-9+/]*")
NOT_IN_BASE64 = "\n\r -_%.:[<"     # of line breaks, other alphabets, a prefix, "[cut]"
NOT_FETCHED = "nothing is fetched here, so inline it as a base64 data URL"
BROKEN = "its base64 is broken"
EMPTY = "it is empty"


class Attached(NamedTuple):
    """Attached data: its media type, whether it is inline base64, the number of data URL prefixes
    that stood before it; why it cannot be shown and what was healed, "" as a rule."""

    data: str
    mime: str
    inline: bool
    prefixes: int
    fault: str = ""
    healed: str = ""


def clean_base64(data: str) -> Optional[str]:
    """Base64 (RFC 4648, section 4) without white space, padded and in its usual alphabet; None
    where it is broken.  What is sound costs a few plain searches, which run at memory's speed."""
    if data.isascii() and len(data) % 4 == 0 and data.find("=", 0, -2) < 0 and not any(
            character in data for character in NOT_IN_BASE64):
        return data
    healed = "".join(data.split()).replace("-", "+").replace("_", "/").rstrip("=")
    if len(healed) % 4 == 1 or not BASE64_TEXT.fullmatch(healed):
        return None
    return healed + "=" * (-len(healed) % 4)


def split_data_url(given: str, label: Optional[str]) -> Attached:
    """A URL (`label` is None) or base64 labelled with a media type, without any prefix."""
    mime, inline, prefixes, at = (label or "").lower(), label is not None, 0, 0
    while prefixes < MAX_DATA_PREFIXES:
        found = DATA_URL.match(given, at)
        if found is None:
            break
        mime, inline, at = (found[1] or mime).lower(), bool(found[3]), found.end()
        prefixes += 1
    return Attached(given[at:] if at else given, mime, inline, prefixes)


def picture_fault(data: str, cleaned: Optional[str], inline: bool, mime: str) -> str:
    """Why data cannot be shown as a picture; "" where it can."""
    if not data or not inline:
        return NOT_FETCHED if data else EMPTY
    if cleaned is None:
        return BROKEN
    return "" if mime in IMAGE_TYPES else "%s is not one of png, jpeg, gif or webp" % (
        printable(mime, 60) or "an unknown type")


def examine_picture(given: str, label: Optional[str]) -> Attached:
    """A picture from a URL (`label` is None), or from base64 labelled with a media type."""
    found = split_data_url(given, label)
    named = "image/jpeg" if found.mime == "image/jpg" else found.mime
    cleaned = clean_base64(found.data)
    start = (cleaned or "")[:20]
    told = next((mime for at, text, mime in PICTURE_BYTES if start.startswith(text, at)), "")
    healed = "%s labelled %s" % (told, named or "nothing") if told not in ("", named) else ""
    if cleaned != found.data or found.prefixes > (1 if label is None else 0):
        healed = healed or "base64 of the picture"
    fault = picture_fault(found.data, cleaned, found.inline or bool(told), told or named)
    return found._replace(data=cleaned or "", mime=told or named, fault=fault, healed=healed)


def decode_document(data: str, mime: str, encoded: bool) -> Tuple[str, str]:
    """(text, "") of a document's data, base64 or percent-encoded, or ("", why there is none)."""
    if not mime.startswith("text/") and mime != "application/json":
        return "", "%s cannot be read as text" % printable(mime, 60)
    cleaned = clean_base64(data) if encoded else ""
    if cleaned is None:
        return "", BROKEN
    text = base64.b64decode(cleaned).decode("utf-8", "replace") if encoded else unquote(data)
    return (text, "") if text.strip() else ("", EMPTY)


# === PART: WAIST (pure) =====================================================
# === PROMPT (pure) ==========================================================
# The upper half of the waist: `Prompt` is what is asked, in our own terms, and
# all that a face and an upstream format share of a request.  Its parts are
# plain tuples; the sections below read them from any API and put them in order.


class Text(NamedTuple):
    """Text of a prompt; `cache` is its cache_control, carried along untouched.  `fault` is the
    error of the part whose place it takes because that part cannot be shown."""

    text: str
    cache: Optional[Json] = None
    fault: Optional[ProxyError] = None


class Image(NamedTuple):
    """A picture as a base64 data URL."""

    url: str
    mime: str
    cache: Optional[Json] = None


class Thinking(NamedTuple):
    """The model's thinking of an earlier turn, and its provider's signature where one came."""

    text: str
    signature: str = ""


class Call(NamedTuple):
    """A tool call of an earlier turn."""

    id: str
    name: str
    arguments: Json
    cache: Optional[Json] = None
    namespace: str = ""


class Result(NamedTuple):
    """What a tool answered; whose tool it was is known once it is matched with its call."""

    id: str
    text: str
    images: Tuple[Image, ...] = ()
    is_error: bool = False
    name: str = ""
    cache: Optional[Json] = None
    namespace: str = ""


Part = Union[Text, Image, Thinking, Call, Result]


class Turn(NamedTuple):
    """One message of a conversation: role `user`, `assistant`, `system` (one Text, behind the first
    message) or (after repair) `tool`."""

    role: str
    parts: List[Part]


# Types of tools: a custom one takes free text, a hosted one only its vendor can run.
FUNCTION, CUSTOM, HOSTED = "function", "custom", "hosted"


class Tool(NamedTuple):
    """A function that the model may call; `type` is what the client's API calls such a tool."""

    name: str
    description: str
    schema: Json
    cache: Optional[Json] = None
    namespace: str = ""
    type: str = FUNCTION


class ToolName(NamedTuple):
    """A tool as the client knows it, behind the name under which it is sent."""

    name: str
    namespace: str = ""
    type: str = FUNCTION


class Choice(NamedTuple):
    """Which tools may be called: `auto`, `none`, `any`, or one: `tool` by name, `type` by type."""

    kind: str
    name: str = ""
    namespace: str = ""
    allowed: Optional[Tuple[Any, ...]] = None       # with `auto` and `any`: choices of one each


@dataclass(**SLOTS)
class Prompt:
    """A request in our own terms, from whichever face it came."""

    asked: str                                  # model as the client wrote it
    turns: List[Turn]
    source: str = "messages"                    # member of the request that holds the turns
    system: List[Text] = field(default_factory=list)
    tools: List[Tool] = field(default_factory=list)
    choice: Optional[Choice] = None
    parallel: bool = True                       # more than one call in an answer is wanted
    max_tokens: Optional[int] = None
    temperature: Optional[float] = None
    top_p: Optional[float] = None
    effort: Optional[str] = None
    stops: List[str] = field(default_factory=list)
    json_format: Optional[Json] = None          # {} any JSON, else {"schema": ...}
    stream: bool = False
    show_thinking: bool = True
    session: str = ""                           # id of the conversation, once derived
    include_usage: bool = False                 # Chat: a usage chunk at the end of the stream
    user_id: Any = None                         # Messages: metadata.user_id
    model: str = ""                             # wire id, once resolved
    names: Dict[str, ToolName] = field(default_factory=dict)    # by the name that is sent
    notes: List[str] = field(default_factory=list)
    carry_thinking: bool = False                # Responses: reasoning items carry their text
    echo: Json = field(default_factory=dict)    # Responses: members that the answer repeats
    remember: bool = False                      # Responses: items may be referred to later
    budget: Optional[int] = None                # thinking was asked for: tokens, 0 for any number
    no_answer: bool = False                     # max_tokens 0: an empty answer, without a call


# === EVENTS (pure) ==========================================================
# The lower half of the waist: what is answered, as events in this order:
#
#     Begin (Open Delta* Close)* (End | Fail)
#
# `Face` and `UpstreamFormat` are the two neighbours of the waist.

TEXT, THINKING, REFUSAL, TOOL = "text", "thinking", "refusal", "tool"
STOP, LENGTH, TOOL_CALLS, FILTERED, PAUSED = "stop", "length", "tool_calls", "filtered", "paused"


class Usage(NamedTuple):
    """Tokens as the upstream counted them; `input` includes cached ones, None is not told."""

    input: int
    output: int
    cache_read: Optional[int] = None
    cache_write: Optional[int] = None
    reasoning: Optional[int] = None


@dataclass(eq=False, **SLOTS)
class Block:
    """One run of text, of thinking or of a refusal, or one tool call, as it grows."""

    kind: str
    call_id: str = ""
    name: str = ""
    index: int = -1             # among the blocks that are shown
    number: int = -1            # among the shown blocks of its kind
    whole: bool = False         # a call's arguments are complete
    begun: bool = False         # it was opened, or waits for that
    broken: bool = False        # the answer failed inside it
    half: str = ""              # first half of a surrogate pair, waiting for the second
    signature: str = ""
    namespace: str = ""
    type: str = FUNCTION        # of a call's tool, as the client is shown it
    mark: str = ""              # of a call: how the upstream's deltas name it
    pieces: List[Union[str, bytes]] = field(default_factory=list)   # bytes: escaped JSON

    @property
    def raw(self) -> bool:
        """Whether this is the call of a custom tool: its one argument is free text."""
        return self.type == CUSTOM

    @property
    def text(self) -> str:
        """All pieces as one string; neighbouring escaped ones are decoded together."""
        return "".join([json.loads(b'"%b"' % b"".join(run)) if kind is bytes else "".join(run)
                        for kind, run in groupby(self.pieces, type)])


def call_text(block: Block) -> str:
    """A call's arguments as its API shows them: JSON text, or the free text of a raw one."""
    if not block.raw:
        return block.text
    try:
        given = decode_loosely(block.text)["input"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return block.text
    return clean_text(given) if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


# At its Close a block is complete, unless it is `broken`; a call that is not `whole` was cut off.
Begin = NamedTuple("Begin", [])
Open = NamedTuple("Open", [("block", Block)])
Delta = NamedTuple("Delta", [("block", Block), ("text", str)])
Close = NamedTuple("Close", [("block", Block)])
Fail = NamedTuple("Fail", [("error", ProxyError)])      # it will never be complete


class End(NamedTuple):
    """The answer is complete; `sequence` is the stop sequence that ended it."""

    reason: str
    sequence: Optional[str] = None


Event = Union[Begin, Open, Delta, Close, End, Fail]


@dataclass(**SLOTS)
class Reply:
    """The answer so far as it is shown to the client."""

    id: str
    model: str                                  # as the client asked for it
    created: int                                # Unix seconds
    input_estimate: int = 0                     # tokens, before the upstream tells
    raw_estimate: int = 0                       # the same before calibration
    family: str = ""                            # what is calibrated together; "" is not
    include_usage: bool = False
    blocks: List[Block] = field(default_factory=list)
    reason: str = ""
    sequence: Optional[str] = None
    usage: Optional[Usage] = None
    output_estimate: int = 0                    # characters so far; tokens once it has ended
    cost: Optional[str] = None                  # USD, as the upstream wrote it
    notes: List[str] = field(default_factory=list)
    frames_sent: int = 0                        # of a face that numbers them
    remember: bool = False
    carry_thinking: bool = False
    echo: Json = field(default_factory=dict)

    def of_kind(self, kind: str) -> List[Block]:
        return [block for block in self.blocks if block.kind == kind]


@dataclass(**SLOTS)
class Reading:
    """What the waist remembers of an upstream's answer between two lines."""

    live: Optional[Block] = None                # the open block
    waiting: Deque[Block] = field(default_factory=deque)    # began while a call was unfinished
    calls: Dict[str, Block] = field(default_factory=dict)   # by their marks
    ignored: Set[str] = field(default_factory=set)      # calls that are not looked at again
    one_call: bool = False                      # calls after the first are left out
    began: bool = False
    over: bool = False
    reason: str = ""                            # the upstream's word, where the end comes later
    mute_thinking: bool = False                 # a repeated call's thinking was shown already
    event: Union[bytes, bytearray] = b""        # data lines that wait for the others of their event
    usage: Optional[Usage] = None
    cost: Optional[str] = None
    notes: List[str] = field(default_factory=list)


class Face(NamedTuple):
    """One public API, seen from the waist: functions, and what a stream must keep."""

    name: str
    parse: Callable[[Json, List[str]], Prompt]
    frames: Callable[[Reply, Event], bytes]
    body: Callable[[Reply], Json]
    error: Callable[[ProxyError], Json]
    id_prefix: str
    fields: Mapping[str, Any]   # see FIELD TABLES
    keeps: bool = False         # frames need the whole block at its Close
    numbered: bool = False      # each frame ends with its number (Reply.frames_sent)
    types: FrozenSet[str] = frozenset()     # of tools whose calls it shows in their own way


class UpstreamFormat(NamedTuple):
    """One upstream's wire format, seen from the waist."""

    name: str
    path: str
    build: Callable[[Prompt, str], bytes]       # prompt, session id
    read_line: Callable[[Reading, bytes], Iterable[Event]]
    read_failure: Callable[[int, Fields, bytes], ProxyError]
    lanes: Mapping[str, bytes]                  # block kind -> pattern of one whole delta line
    fields: Callable[[Config, str, str], Iterable[Tuple[str, str]]] = (     # headers of its own
        lambda config, cli_version, session: ())
    read_end: Callable[[Reading], Iterator[Event]] = lambda reading: iter(())   # of the body
    skip: bytes = b"\n"         # how a line begins that nobody wants: none begins with its own end
    key_field: str = "authorization"            # the header of the key; this one as Bearer
    needs_limit: bool = True                    # whether max_tokens must be sent


# === GRAMMAR (pure) =========================================================
# Where blocks are opened and closed, once for all upstreams and faces: whatever an
# upstream's readers call here gives events in the order that the waist promises.
# Parallel calls may arrive mixed: a block that comes while a call is unfinished waits
# until that call is whole, so that blocks go out one after another and in the order
# in which they began.


def join_halves(block: Block, text: str) -> str:
    """Text whose surrogate pairs are whole, keeping back a first half at its end.  JavaScript
    upstreams may cut an emoji between two deltas; half of one is not UTF-8."""
    text = block.half + text
    block.half = ""
    if not SURROGATE.search(text):
        return text
    if "\ud800" <= text[-1] <= "\udbff":
        text, block.half = text[:-1], text[-1]
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def grow(reading: Reading, block: Block, text: str) -> Iterator[Event]:
    """Add text to a block: to the open one as events, where a call's is kept here too, for its end
    is judged by it; one that waits keeps it."""
    if block is not reading.live:
        block.pieces.append(text)
        return
    whole = join_halves(block, text)
    if whole:
        if block.kind == TOOL:
            block.pieces.append(whole)
        yield Delta(block, whole)


def close_live(reading: Reading) -> Iterator[Event]:
    """Close the open block, if there is one."""
    block, reading.live = reading.live, None
    if block is None:
        return
    if block.half and not block.broken:
        block.half = ""
        yield Delta(block, "\ufffd")
    yield Close(block)


def begin_block(reading: Reading, block: Block) -> Iterator[Event]:
    """Open a block now, unless that was done, or let it wait while a call is unfinished."""
    if block.begun:
        return
    block.begun = True
    live = reading.live
    if live is not None and live.kind == TOOL and not live.whole:
        reading.waiting.append(block)
        return
    yield from close_live(reading)
    reading.live = block
    yield Open(block)


def extend(reading: Reading, kind: str, text: str) -> Iterator[Event]:
    """Add text or thinking to the open block of that kind, opening one if need be."""
    last = reading.waiting[-1] if reading.waiting else reading.live
    if last is None or last.kind != kind:
        last = Block(kind)
        yield from begin_block(reading, last)
    yield from grow(reading, last, text)


def start_call(reading: Reading, call_id: str, name: str, mark: str = "") -> None:
    """Learn of a tool call, once per mark (its id, where deltas name it by that).  Its block opens
    with its first argument: clients run a call that is closed without any as if it had none."""
    mark = mark or call_id
    if mark not in reading.calls:
        if len(reading.calls) >= MAX_CALLS:
            raise ProxyError("upstream", "The upstream's answer holds more than %d tool calls."
                             % MAX_CALLS)
        block = Block(TOOL, call_id, name, mark=mark)
        if reading.one_call and reading.calls:
            block.begun = block.whole = True        # so that nothing of it is shown
            add_note(reading.notes, "left_out", "call of %s, for parallel calls are off" % name)
        reading.calls[mark] = block


def extend_call(reading: Reading, call_id: str, text: str) -> Iterator[Event]:
    """Add a piece to the JSON text of a call's arguments."""
    block = reading.calls.get(call_id)
    if block is None or block.whole:
        return
    yield from begin_block(reading, block)
    yield from grow(reading, block, text)


def finish_call(reading: Reading, call_id: str, name: str, arguments: str) -> Iterator[Event]:
    """A call is complete with these arguments (JSON text); what went out already stays out."""
    start_call(reading, call_id, name)
    block = reading.calls[call_id]
    if block.whole:
        return
    yield from begin_block(reading, block)
    if block is not reading.live:
        block.whole, block.pieces = True, [arguments]
        return
    shown = block.text
    if not shown.strip():
        yield from grow(reading, block, arguments)
    elif arguments.startswith(shown):
        yield from grow(reading, block, arguments[len(shown):])
    elif not same_json(shown, arguments):
        add_note(reading.notes, "tool_input", "streamed pieces of %s differ from its call" % name)
        block.pieces = [arguments]      # the call is the truth, where it is not too late
    block.whole = True
    yield from close_live(reading)
    yield from promote_waiting(reading)


def same_json(one: str, other: str) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except (ValueError, RecursionError):
        return False


def promote_waiting(reading: Reading, complete: bool = False) -> Iterator[Event]:
    """Open what waited, in order, up to the first block that can still grow; none can where the
    answer is `complete`."""
    while reading.waiting and reading.live is None:
        block = reading.waiting.popleft()
        held, block.pieces = block.text, []
        reading.live = block
        yield Open(block)
        yield from grow(reading, block, held)
        if complete or block.whole or (block.kind != TOOL and reading.waiting):
            yield from close_live(reading)


def close_all(reading: Reading) -> Iterator[Event]:
    """Close the open block and show what waited; calls that are not whole stay cut."""
    for block in reading.calls.values():
        if not block.whole:
            add_note(reading.notes, "cut", "tool call %s is incomplete" % block.name)
    yield from close_live(reading)
    yield from promote_waiting(reading, complete=True)


def end_answer(reading: Reading, word: str) -> Iterator[Event]:
    """The upstream finished for the reason `word` (one of ours): judged by what was emitted."""
    yield from close_all(reading)
    calls = reading.calls.values()
    if any(not call.whole for call in calls):
        word = LENGTH
    elif calls and word == STOP:
        word = TOOL_CALLS
    elif not calls and word == TOOL_CALLS:
        word = STOP
    reading.over = True
    yield End(word)


def fail_answer(reading: Reading, error: ProxyError) -> Iterator[Event]:
    """The answer cannot be completed."""
    if not reading.began:
        reading.began = True
        yield Begin()
    reading.waiting.clear()
    if reading.live is not None:
        reading.live.broken = True
    yield from close_all(reading)
    reading.over = True
    yield Fail(error)


def sign_thinking(reading: Reading, signature: Any) -> Iterator[Event]:
    """The signature of the open thinking, whose text may be withheld.  Where a repeated call's
    thinking is left out, so is its signature: it is not of what was shown."""
    if not isinstance(signature, str) or not signature or reading.mute_thinking:
        return
    yield from extend(reading, THINKING, "")
    block = reading.waiting[-1] if reading.waiting else reading.live
    if block is not None:
        held, block.signature = block.signature, ""
        held += signature           # in place, for nothing else refers to it
        block.signature = held
        if len(block.signature) > MAX_SIGNATURE_BYTES:
            yield from fail_answer(reading, ProxyError(
                "upstream_final", "A signature is longer than %d bytes." % MAX_SIGNATURE_BYTES))


# === FIELD TABLES (pure) ====================================================
# One table per API of the fields that it documents (OpenAI: create chat
# completion, create a model response; Anthropic: create a message, with betas;
# OpenRouter: reasoning).  A row is HONOURED, or a tuple of the values that ask
# for nothing (any other value is noted as ignored), or the table of the field's
# own members.  Every API accepts the fields of ANY_FIELDS.  A field without a
# row is ignored, and x-ccproxy-strict refuses it.

MAX_UNKNOWN = 100           # unknown fields that are named in one answer's notes
HONOURED = None             # used, or a label that changes no answer: user, cache key
NOTHING: Tuple[Any, ...] = (None, "", [], {})       # values that ask for nothing in any field


def honoured(names: str) -> Dict[str, Any]:
    """HONOURED rows for the names in a text."""
    return dict.fromkeys(names.split(), HONOURED)


NAMED_SCHEMA = honoured("name description schema strict")
FORMAT_FIELDS = {**NAMED_SCHEMA, "type": HONOURED, "json_schema": NAMED_SCHEMA}
ANY_FIELDS: Dict[str, Any] = {
    **honoured("model stream temperature top_p stop stop_sequences tools functions max_tokens "
               "max_completion_tokens max_output_tokens parallel_tool_calls reasoning_effort"),
    "tool_choice": honoured("type name namespace mode tools function custom tool allowed_tools "
                            "server_label disable_parallel_tool_use"),
    "response_format": FORMAT_FIELDS, "output_format": FORMAT_FIELDS,
    "output_config": {"effort": HONOURED, "format": FORMAT_FIELDS, "task_budget": ()},
    "text": {"format": FORMAT_FIELDS, "verbosity": ("medium",)}, "verbosity": ("medium",),
    "reasoning": {**honoured("effort enabled max_tokens exclude"),
                  "summary": ("auto", "detailed"), "generate_summary": ("auto", "detailed"),
                  "context": ("auto",), "mode": ("standard",)},
    "thinking": {**honoured("budget_tokens block_binding"),
                 "type": ("enabled", "adaptive", "disabled"), "display": ("summarized", "omitted")},
    "stream_options": {"include_usage": HONOURED, "include_obfuscation": (False,)},
    "seed": (), "top_k": (), "min_p": (), "repetition_penalty": (), "frequency_penalty": (0,),
    "presence_penalty": (0,), "logit_bias": (), "logprobs": (False,), "top_logprobs": (0,),
    "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (),
    "service_tier": ("auto", "default"), "container": (), "mcp_servers": (), "inference_geo": (),
    "truncation": ("disabled",), "max_tool_calls": (), "prompt": ()}
OPENAI_FIELDS: Dict[str, Any] = {
    **ANY_FIELDS,
    **honoured("user safety_identifier prompt_cache_key metadata client_metadata"),
    "prompt_cache_options": {"mode": ("implicit",), "ttl": ("30m",), "prewarm": (False,),
                             "comparison_response_id": ()},
    "prompt_cache_retention": ("in_memory",), "moderation": ()}

# Members of tools, messages and content parts (by type).  defer_loading and eager_input_streaming
# change no answer: every tool is loaded, and its input is streamed as it comes.
TOOL_FIELDS: Dict[str, Any] = {
    **honoured("type name description parameters input_schema format function custom "
               "cache_control defer_loading eager_input_streaming"),
    "strict": (False,), "input_examples": (), "output_schema": (), "async": (False,),
    "allowed_callers": (["direct"],)}
MESSAGE_FIELDS: Dict[str, Any] = {"name": (), "audio": (), "clear_at": ("never",),
                                  "output_config": ()}
TOOL_ROLES = ("tool", "function")       # a result may be known by its tool's name
CITATIONS, FULL_SIZE = ({"enabled": False},), ("auto", "high", "original")
PART_FIELDS: Dict[str, Dict[str, Any]] = {
    "document": {"citations": CITATIONS, "context": ()}, "search_result": {"citations": CITATIONS},
    "image": {"transformations": ({"oversized_image": "downsize"},)},
    "image_url": {"image_url": {"detail": FULL_SIZE}, "prompt_cache_breakpoint": ()},
    "input_image": {"detail": FULL_SIZE, "prompt_cache_breakpoint": ()},
    "input_file": {"detail": FULL_SIZE, "prompt_cache_breakpoint": ()},
    **dict.fromkeys(("file", "text", "input_text"), {"prompt_cache_breakpoint": ()})}


def note_ignored(holder: Json, table: Mapping[str, Any], notes: List[str], path: str = "") -> None:
    """Note each known field whose value asks for what cannot be honoured."""
    for name, given in holder.items():
        row = table.get(name, HONOURED)
        if row is HONOURED:
            continue
        if isinstance(row, dict):
            if isinstance(given, dict):
                note_ignored(given, row, notes, path + name + ".")
        elif given not in NOTHING and given not in row \
                and "ignored=" + path + name not in notes[-8:]:     # as of the tool before
            add_note(notes, "ignored", path + name)


def note_unknown(holder: Json, table: Mapping[str, Any], notes: List[str], path: str = "") -> None:
    """Note each field that has no row, in each object the first MAX_UNKNOWN of them."""
    for name in [name for name in holder if name not in table][:MAX_UNKNOWN]:
        add_note(notes, "ignored", path + name)
    for name, row in table.items():
        if isinstance(row, dict) and isinstance(holder.get(name), dict):
            note_unknown(holder[name], row, notes, path + name + ".")


# === HOSTED RESULTS (pure) ==================================================
# What a vendor's own tools did in earlier turns (web search, code, MCP), in
# content parts and in items: no other model can take them, so they become text.

HOSTED_PARTS = (
    "server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "mcp_tool_use",
    "mcp_tool_result", "mcp_tool_listing", "code_execution_tool_result", "tool_search_tool_result",
    "bash_code_execution_tool_result", "text_editor_code_execution_tool_result",
    "advisor_tool_result")
HOSTED_ITEMS = ("web_search_call", "file_search_call", "code_interpreter_call", "mcp_call",
                "mcp_list_tools", "mcp_approval_request", "image_generation_call")
OPAQUE = frozenset({    # members that say nothing to another model
    "type", "id", "tool_use_id", "call_id", "file_id", "container_id", "encrypted_content",
    "encrypted_index", "encrypted_stdout", "signature", "cache_control", "caller", "status",
    "result", "media_type", "score", "annotations", "input_schema"})


def hosted_lines(name: str, value: Any) -> Iterator[str]:
    """The titles, addresses, texts and numbers in a vendor's result, each behind its name."""
    if isinstance(value, dict) and value.get("type") != "base64":
        for member, inner in value.items():
            if member not in OPAQUE:
                yield from hosted_lines(member[:MAX_TOOL_NAME], inner)
    elif isinstance(value, list):
        for inner in value:
            yield from hosted_lines(name, inner)
    elif isinstance(value, (str, int, float)):
        line = "%s: %s" % (name, value)
        if ": data:" not in line[:100] and line.partition(": ")[2].strip() not in ("", "False"):
            yield line


# === CONTENT PARTS (pure) ===================================================
# One table of every content part that any API may bring: clients mix them, so
# every face uses it.  A wrong type in a field that is used is a 400 that names
# its path.  A part that cannot be shown (a PDF, audio, a picture by its URL)
# becomes one line of text, with a note: a 400 would lock the conversation, for
# clients send their whole history again.  Nothing is ever fetched.

JSON_TYPES: Dict[str, Any] = {"a string": str, "a list": list, "an object": dict,
                              "a boolean": bool, "a number": (int, float)}
BILLING_LINE = "x-anthropic-billing-header:"        # changes on every request: breaks the cache
UNNAMED = "unnamed"
REMINDER = "<system-reminder>\n%s\n</system-reminder>"
NOT_STORED = "no files are kept here, so send its data (image_url, source or file_data)"
NO_DATA = "it holds no data (image_url, source or file_data)"
MEDIA_KINDS = {"input_audio": "audio", "audio": "audio", "audio_url": "audio", "media": "media",
               "input_video": "video", "video": "video", "video_url": "video",
               "container_upload": "file"}


def wrong(path: str, problem: str) -> ProxyError:
    return ProxyError("invalid", "%s %s." % (path, problem), param=path)


def check(value: Any, expected: str, path: str) -> Any:
    """The value, if it is of the JSON type expected (a row of JSON_TYPES)."""
    fits = isinstance(value, JSON_TYPES[expected])
    if not fits or (isinstance(value, bool) and expected != "a boolean"):
        raise wrong(path, "must be " + expected)
    return value


def get(holder: Json, name: str, expected: str, path: str = "") -> Any:
    """An optional member of the type expected; None when it is absent or null."""
    value = holder.get(name)
    if value is None:
        return None
    return check(value, expected, "%s.%s" % (path, name) if path else name)


def unwrap(holder: Json, name: str, path: str) -> Tuple[Json, str]:
    """(the members of an object, their path): some APIs wrap them in the member `name`."""
    inner = get(holder, name, "an object", path)
    return (holder, path) if inner is None else (inner, "%s.%s" % (path, name))


def read_cache(holder: Json, path: str) -> Optional[Json]:
    """cache_control as the upstream takes it."""
    if "cache_control" not in holder:
        return None             # nearly always
    given = get(holder, "cache_control", "an object", path)
    if not given or given.get("type") != "ephemeral":
        return None
    lifetime = {"ttl": given["ttl"]} if given.get("ttl") in ("5m", "1h") else {}
    return {"type": "ephemeral", **lifetime}


def is_blank(text: Optional[str]) -> bool:
    """Whether a text says nothing: providers refuse white space alone as they do nothing at all."""
    return not text or text.isspace()


def read_text(part: Json, path: str, notes: List[str]) -> List[Part]:
    text = get(part, "refusal" if part.get("type") == "refusal" else "text", "a string", path)
    return [] if is_blank(text) else [Text(text, read_cache(part, path))]


def unreadable(name: str, reason: str, path: str, cache: Optional[Json],
               notes: List[str]) -> List[Part]:
    """One line for the model in the place of a part that cannot be shown."""
    add_note(notes, "unreadable", "%s at %s" % (name, path))
    return [Text("[attached: %s, not shown: %s]" % (name, reason), cache,
                 wrong(path, "cannot be shown to the model: %s" % reason))]


def why_no_data(*holders: Any) -> str:
    """Why a part has no data of its own, by what its objects hold in place of it."""
    members = {name for holder in holders if isinstance(holder, dict)
               for name in ("file_id", "file_url", "url") if holder.get(name)}
    return NOT_STORED if "file_id" in members else NOT_FETCHED if members else NO_DATA


def read_picture(given: str, label: Optional[str], path: str, cache: Optional[Json],
                 notes: List[str]) -> List[Part]:
    """An Image of a URL (`label` is None), or of base64 labelled with a media type."""
    given = given.strip()
    picture = examine_picture(given, label)
    if picture.fault:
        return unreadable("picture", picture.fault, path, cache, notes)
    plain = "data:%s;base64," % picture.mime
    if picture.healed:
        add_note(notes, "repaired", "%s at %s" % (picture.healed, path))
    elif given.startswith(plain):       # nearly always: not copied
        return [Image(given, picture.mime, cache)]
    return [Image(plain + picture.data, picture.mime, cache)]


def picture_source(part: Json, path: str) -> Tuple[Any, Optional[str], str]:
    """(URL or base64, base64's media type or None for a URL, path) of a picture in any API's
    spelling, among them MCP's (data and mimeType in the part itself)."""
    given = part.get("image_url")
    if isinstance(given, dict):
        return get(given, "url", "a string", path + ".image_url"), None, path + ".image_url.url"
    if given is not None:
        return check(given, "a string", path + ".image_url"), None, path + ".image_url"
    source, where = unwrap(part, "source", path)
    get(source, "type", "a string", where)
    data = get(source, "data", "a string", where)
    mimes = [get(source, name, "a string", where) for name in ("media_type", "mimeType")]
    if data is not None:
        return data, mimes[0] or mimes[1] or "", where + ".media_type"
    url = get(source, "url", "a string", where)
    return url, None, where if url is None else where + ".url"


def read_image(part: Json, path: str, notes: List[str]) -> List[Part]:
    """Chat's image_url, Responses' input_image and Anthropic's image."""
    cache = read_cache(part, path)
    given, label, where = picture_source(part, path)
    if given is None:
        reason = why_no_data(part, part.get("image_url"), part.get("source"))
        return unreadable("picture", reason, where, cache, notes)
    return read_picture(given, label, where, cache, notes)


def read_media(part: Json, path: str, notes: List[str]) -> List[Part]:
    """Audio, video and files that lie elsewhere: no upstream takes them."""
    reason = NOT_STORED if part.get("file_id") else "only text and pictures can be shown"
    return unreadable(MEDIA_KINDS[part["type"]], reason, path, read_cache(part, path), notes)


def document_text(part: Json, source: Json, found: Optional[Attached], path: str,
                  notes: List[str]) -> Tuple[str, str]:
    """(text, "") of a document, or ("", the reason why it has none)."""
    kind = get(source, "type", "a string", path + ".source")
    if kind == "content":
        text = "\n".join(inner_texts(source, path + ".source", notes))
    elif found is None:
        return "", why_no_data(part, part.get("file"), source)
    elif kind != "text" and found.data:
        unnamed = "text/plain" if found.prefixes else "application/octet-stream"
        return decode_document(found.data, found.mime or unnamed, found.inline)
    else:
        text = found.data
    return (text, "") if text.strip() else ("", EMPTY)


def read_document(part: Json, path: str, notes: List[str]) -> List[Part]:
    """A text document as text, a picture as a picture; Chat wraps its members in `file`."""
    inner, where = unwrap(part, "file", path)
    title = get(part, "title", "a string", path) or get(inner, "filename", "a string", where) or ""
    cache = read_cache(part, path)
    source = get(part, "source", "an object", path) or {}
    data = get(source, "data", "a string", path + ".source")
    mime = get(source, "media_type", "a string", path + ".source")
    data = get(inner, "file_data", "a string", where) if data is None else data
    found = None if data is None else split_data_url(data, mime or "")
    if found and found.data and found.mime.startswith("image/"):
        return read_picture(found.data, found.mime, path, cache, notes)
    text, reason = document_text(part, source, found, path, notes)
    if reason:
        return unreadable(" ".join(title[:200].split()) or "document", reason, path, cache, notes)
    return [Text("<document title=%s>\n%s\n</document>" % (
        json.dumps(title[:200] or UNNAMED), text), cache)]


def read_thinking(part: Json, path: str, notes: List[str]) -> List[Part]:
    """Thinking with its signature, which may stand alone: its text may have been withheld."""
    text = get(part, "thinking", "a string", path) or ""
    signature = get(part, "signature", "a string", path) or ""
    signature = "" if signature == DEFAULT_SIGNATURE else signature
    return [Thinking(text, signature)] if text or signature else []


def read_arguments(given: Any, path: str, notes: List[str]) -> Json:
    """A call's arguments as an object, from an object or from JSON text."""
    if given is None or isinstance(given, dict):
        return given or {}
    check(given, "a string", path)
    try:
        decoded = REQUEST_DECODER.decode(given) if given.strip() else {}
    except (ValueError, RecursionError):
        decoded = decode_anyhow(given)      # cut off: the model may see what it was
        if decoded != given:
            add_note(notes, "replaced", "invalid escapes, characters or numbers at %s" % path)
    if has_surrogates(given):
        decoded = clean_value(decoded)
        add_note(notes, "replaced", "lone surrogates by U+FFFD at %s" % path)
    if not isinstance(decoded, dict):
        add_note(notes, "repaired", "arguments at %s are not a JSON object" % path)
        return {"input": decoded}
    return decoded


def read_call(part: Json, path: str, notes: List[str]) -> List[Part]:
    name = get(part, "name", "a string", path) or UNNAMED
    return [Call(get(part, "id", "a string", path) or "", name,
                 read_arguments(part.get("input"), path + ".input", notes),
                 read_cache(part, path), get(part, "toolset_name", "a string", path) or "")]


def read_result(part: Json, path: str, notes: List[str]) -> List[Part]:
    """Anthropic's tool_result: a string, parts of which pictures are kept apart, or any object."""
    parts = read_result_parts(part.get("content"), path + ".content", notes)
    return [make_result(get(part, "tool_use_id", "a string", path) or "", parts,
                        bool(get(part, "is_error", "a boolean", path)),
                        read_cache(part, path))]


def make_result(call_id: str, parts: List[Part], is_error: bool, cache: Optional[Json]) -> Result:
    texts = [part.text for part in parts if isinstance(part, Text)]
    images = tuple(part for part in parts if isinstance(part, Image))
    return Result(call_id, "\n".join(texts), images, is_error, "", cache)


def read_tool_reference(part: Json, path: str, notes: List[str]) -> List[Part]:
    """What Claude Code's tool search found (R15)."""
    name = get(part, "tool_name", "a string", path)
    return [Text("Tool available: %s" % name)] if name else []


def inner_texts(part: Json, path: str, notes: List[str]) -> List[str]:
    """The texts of a part's own content; a note for other parts in it."""
    parts = read_content(part.get("content"), path + ".content", notes)
    if not all(isinstance(one, Text) for one in parts):
        add_note(notes, "dropped", "pictures in %s at %s" % (part.get("type"), path))
    return [one.text for one in parts if isinstance(one, Text)]


def read_search_result(part: Json, path: str, notes: List[str]) -> List[Part]:
    texts = [get(part, name, "a string", path) for name in ("title", "source")]
    text = "\n".join(filter(None, texts + inner_texts(part, path, notes)))
    return [] if is_blank(text) else [Text(text, read_cache(part, path))]


def read_wrapped(part: Json, path: str, notes: List[str]) -> List[Part]:
    """Anthropic's compaction, a summary of earlier turns (null where that failed), and its
    mid_conv_system, a system message inside a user's."""
    between, words = ("\n", "%s") if part["type"] == "compaction" else ("\n\n", REMINDER)
    texts = inner_texts(part, path, notes)
    return [Text(words % between.join(texts), read_cache(part, path))] if texts else []


def read_unusable(part: Json, path: str, notes: List[str]) -> List[Part]:
    add_note(notes, "dropped", "%s at %s" % (printable(str(part.get("type")), 60), path))
    return []


def read_hosted(part: Json, path: str, notes: List[str]) -> List[Part]:
    """What a vendor's own tool was asked or gave, as text."""
    lines = list(hosted_lines("", part))
    if not lines:
        return read_unusable(part, path, notes)
    add_note(notes, "replaced", "%s at %s by its text" % (part["type"], path))
    return [Text("\n".join(["[%s]" % part["type"], *lines]))]


PART_READERS: Dict[str, Callable[[Json, str, List[str]], List[Part]]] = {
    **dict.fromkeys(HOSTED_PARTS, read_hosted),
    "text": read_text, "input_text": read_text, "output_text": read_text, "refusal": read_text,
    "image_url": read_image, "input_image": read_image, "image": read_image,
    "document": read_document, "file": read_document, "input_file": read_document,
    "thinking": read_thinking, "redacted_thinking": read_unusable,
    "tool_use": read_call, "tool_result": read_result, "tool_reference": read_tool_reference,
    "search_result": read_search_result, "computer_screenshot": read_image,
    "compaction": read_wrapped, "mid_conv_system": read_wrapped,
    **dict.fromkeys(MEDIA_KINDS, read_media)}


def read_content(content: Any, path: str, notes: List[str]) -> List[Part]:
    """A message's content, a string or a list of parts of any API, as parts of the waist."""
    if content is None or isinstance(content, str):
        return [] if is_blank(content) else [Text(content)]
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise wrong(path, "must be a string or a list of parts")
    parts: List[Part] = []
    for index, part in enumerate(content):
        here = "%s[%d]" % (path, index)
        if isinstance(part, str):
            part = {"text": part}
        kind = check(part, "an object", here).get("type", "text")
        reader = PART_READERS.get(check(kind, "a string", here + ".type"), read_unusable)
        if kind in PART_FIELDS and (len(part) > 2 or kind == "image_url"):
            note_ignored(part, PART_FIELDS[kind], notes, kind + ".")
        parts += reader(part, here, notes)
    return parts


DATA_MEMBERS: Json = {"image_url": (str, dict), "source": dict, "file": dict, "data": str,
                      "file_data": str, "file_id": str, "file_url": str}
# The parts that a tool's result can have, by members that tell them from a tool's own objects:
# {"type": "file", "path": "a.txt"} is an entry of a listing.
RESULT_PARTS: Dict[str, Json] = {
    "input_text": {"text": object}, "output_text": {"text": object},
    **dict.fromkeys(("image_url", "input_image", "image", "document", "file", "input_file",
                     "computer_screenshot"), DATA_MEMBERS),
    **{kind: {kind: dict, **DATA_MEMBERS} for kind in MEDIA_KINDS}, "refusal": {"refusal": object},
    "tool_reference": {"tool_name": object}, "search_result": {"content": (list, str)}}


def is_result_part(value: Any) -> bool:
    """Whether a value in a tool's result is a content part, not an object of the tool's own."""
    if not isinstance(value, dict):
        return False
    kind = value.get("type", "text" if len(value) == 1 else None)
    if kind == "text":          # nearly always
        return "text" in value
    members = RESULT_PARTS.get(kind, {}) if isinstance(kind, str) else {}
    return any(name in value and isinstance(value[name], types)
               for name, types in members.items())


def read_result_parts(content: Any, path: str, notes: List[str]) -> List[Part]:
    """A tool's result: a string as it is, parts as parts, other objects and lists as JSON text."""
    if isinstance(content, str):
        return [Text(content)] if content else []
    if isinstance(content, dict) or content and isinstance(content, list):
        values = content if isinstance(content, list) else [content]
        if not any(map(is_result_part, values)):
            return [Text(ENCODER.encode(content))]
        content = [value if isinstance(value, str) or is_result_part(value)
                   else ENCODER.encode(value) for value in values]
    return read_content(content, path, notes)


# === TOOL SCHEMAS (pure) ====================================================
# A tool's parameters in the form that every provider takes: one object with
# `properties` and without unions at its top, arrays that have `items`, bounds
# that are numbers.  A schema in that form is sent as it is; every change leaves
# a note with the tool's name.  Depth, references and branches are bounded.

SCHEMA_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions",
                         "dependentSchemas"})       # their members are names, not keywords
SCHEMA_WORDS = SCHEMA_MAPS | {
    "items", "prefixItems", "additionalItems", "unevaluatedItems", "contains",
    "additionalProperties", "unevaluatedProperties", "propertyNames", "anyOf", "oneOf", "allOf",
    "not", "if", "then", "else"}
BRANCHES = ("allOf", "anyOf", "oneOf")
TOP_WORDS = ("$ref", *BRANCHES, "not", "enum")      # what OpenAI refuses at a schema's top
BOUNDS_BY_FLAG = {"exclusiveMinimum": "minimum", "exclusiveMaximum": "maximum"}     # draft 4
NOT_IN_LEAVES = SCHEMA_WORDS.union(BOUNDS_BY_FLAG)
IRREGULAR = frozenset({("items", list), *((flag, bool) for flag in BOUNDS_BY_FLAG)})
INDEX = re.compile(r"0|[1-9][0-9]{0,8}")
INTO_BRANCH = re.compile(rb'"\$ref":"#/(allOf|anyOf|oneOf)/([0-9]+)')
MAX_SCHEMA_DEPTH = 64           # schemas inside one another that are looked at
MAX_MERGE_DEPTH = 16            # branches inside branches, and references to references
MAX_MERGE_STEPS = 20_000        # branches, properties and required names of a request's tools
LOCAL_REFERENCE = re.compile(r"#(?:/.{0,498})?", re.S)      # # or #/$defs/..., of bounded length


def list_in(schema: Json, word: str) -> List[Any]:
    given = schema.get(word)
    return given if isinstance(given, list) else []


def object_in(holder: Json, name: str) -> Json:
    value = holder.get(name)
    return value if isinstance(value, dict) else {}


def is_regular(schema: Json) -> bool:
    """Whether nothing inside a schema needs a change: nearly always so, and quickly seen.  A loop
    without calls, for it looks at all tools of every request."""
    schemas: List[Any] = [schema]
    for inner in schemas:           # grows by those inside
        if inner.__class__ is not dict:
            continue
        kind = inner.get("type")
        if (kind == "array" or (kind.__class__ is list and "array" in kind)) \
                and not isinstance(inner.get("items"), (dict, bool)):
            return False
        if NOT_IN_LEAVES.isdisjoint(inner):
            continue
        for word in NOT_IN_LEAVES.intersection(inner):
            found = inner[word]
            if found.__class__ is dict:
                schemas += found.values() if word in SCHEMA_MAPS else (found,)
            elif (word, found.__class__) in IRREGULAR:
                return False
            elif found.__class__ is list:
                schemas += found
    return True


def change_schemas(schema: Any, change: Callable[[Json], Json], depth: int = 0) -> Any:
    """A copy of a schema in which every schema is changed, the innermost first; `change` is given
    copies too."""
    if not isinstance(schema, dict) or depth > MAX_SCHEMA_DEPTH:
        return schema
    changed: Json = dict(schema)
    for word in SCHEMA_WORDS.intersection(schema):
        inner = schema[word]
        if isinstance(inner, list):
            changed[word] = [change_schemas(item, change, depth + 1) for item in inner]
        elif word in SCHEMA_MAPS and isinstance(inner, dict):
            changed[word] = {name: change_schemas(item, change, depth + 1)
                             for name, item in inner.items()}
        else:
            changed[word] = change_schemas(inner, change, depth + 1)
    return change(changed)


def regulate(schema: Json, changes: List[str]) -> Json:
    """Give a schema items for its array and numbers for its bounds.  Draft 4 wrote a tuple's items
    as a list, and exclusiveMinimum as a flag beside minimum."""
    items, kind = schema.get("items"), schema.get("type")
    if isinstance(items, list):
        schema["items"] = {"anyOf": items} if items else {}
        changes.append("a list of items made one schema")
    elif "array" in (kind if isinstance(kind, list) else [kind]) \
            and not isinstance(items, (dict, bool)):
        schema["items"] = {}
        changes.append("items added to an array")
    for flag, bound in BOUNDS_BY_FLAG.items():
        if isinstance(schema.get(flag), bool):
            changes.append("%s made a number" % flag)
            if schema.pop(flag) and bound in schema:
                schema[flag] = schema.pop(bound)
    return schema


def resolve_reference(reference: Any, root: Any) -> Any:
    """The schema that a local $ref (# or #/$defs/...) points to; True when there is none."""
    if not isinstance(reference, str) or not LOCAL_REFERENCE.fullmatch(reference):
        return True
    found = root
    for step in unquote(reference).split("/", MAX_SCHEMA_DEPTH)[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list):
            found = found[int(step)] if INDEX.fullmatch(step) and int(step) < len(found) else True
        else:
            found = found.get(step, True) if isinstance(found, dict) else True
    return found


def takes_objects(schema: Any) -> bool:
    """Whether a schema's type lets an object pass; one without a type does."""
    kind = schema.get("type") if isinstance(schema, dict) else "none"
    return "object" in kind if isinstance(kind, list) else kind in ("object", None)


# The members of an object: for each name the schemas of which one applies, and those required.
Members = Tuple[Dict[str, List[Any]], List[str]]


def gather_members(schema: Any, root: Json, steps: List[int], depth: int = 0) -> List[Members]:
    """The members of an object schema and of all its branches; [] where it lets no object pass.
    Of a name that is described twice an object's own description counts, then those of $ref and
    allOf, then all those of a union.  `steps` counts down what may still be looked at."""
    if not takes_objects(schema) or depth > MAX_MERGE_DEPTH:
        return []
    own, names = object_in(schema, "properties"), list_in(schema, "required")
    steps[0] -= 1 + len(own) + len(names)
    if steps[0] < 0:
        return []
    properties = {name: [value] for name, value in own.items()}
    required = [name for name in names if isinstance(name, str)]
    parts = [members for part in (resolve_reference(schema.get("$ref"), root),
                                  *list_in(schema, "allOf"))
             for members in gather_members(part, root, steps, depth + 1)]
    for word in ("anyOf", "oneOf"):
        parts += unite_members([members for branch in list_in(schema, word)
                                for members in gather_members(branch, root, steps, depth + 1)])
    for more, names in parts:
        required += names
        for name, schemas in more.items():
            properties.setdefault(name, schemas)
    return [(properties, list(dict.fromkeys(required)))]


def unite_members(branches: List[Members]) -> List[Members]:
    """A union's members: all properties, and as required what every branch requires."""
    if not branches:
        return []
    united: Dict[str, List[Any]] = {}
    for properties, _ in branches:
        for name, schemas in properties.items():
            united.setdefault(name, []).extend(schemas)
    common = set.intersection(*[set(required) for _, required in branches])
    return [(united, [name for name in branches[0][1] if name in common])]


def unite_schemas(schemas: List[Any]) -> Any:
    """One schema for several alternatives."""
    different = list({id(schema): schema for schema in schemas}.values())
    if len(different) > 1:
        different = list({to_json(schema): schema for schema in different}.values())
    return different[0] if len(different) == 1 else {"anyOf": different}


def keep_branches(schema: Json) -> Json:
    """A schema whose references into its branches hold when these are merged."""
    text = to_json(schema)
    if not INTO_BRANCH.search(text):
        return schema
    kept: Json = json.loads(INTO_BRANCH.sub(rb'"$ref":"#/$defs/\1_\2', text))
    branches = {"%s_%d" % (word, index): branch for word in BRANCHES
                for index, branch in enumerate(list_in(kept, word))}
    return {**kept, "$defs": {**object_in(kept, "$defs"), **branches}}


def merge_top(schema: Json, steps: List[int], changes: List[str]) -> Json:
    """A schema whose reference and branches at the top are merged into one object."""
    schema = keep_branches(schema)
    properties, required = (gather_members(schema, schema, steps) or [({}, [])])[0]
    target = resolve_reference(schema.get("$ref"), schema)
    merged = {**(target if takes_objects(target) else {}), **schema}
    words = ", ".join(filter(schema.__contains__, TOP_WORDS))
    for word in [*TOP_WORDS, "required"]:
        merged.pop(word, None)
    merged["properties"] = {name: unite_schemas(schemas)
                            for name, schemas in properties.items()}
    if required:
        merged["required"] = required
    changes.append("%s at the top merged into one object" % words)
    if steps[0] < 0:
        changes.append("left out what is beyond %d branches and members" % MAX_MERGE_STEPS)
    return merged


def make_object(given: Any, steps: List[int], changes: List[str]) -> Json:
    """A schema whose top is one object with properties; the author's own one where it is one."""
    if not takes_objects(given):
        changes.append("made an object")
        return {"type": "object", "properties": {}}
    # The dialect's name constrains nothing, most clients send it and some providers refuse it.
    schema = {word: value for word, value in given.items() if word != "$schema"}
    if not schema.keys().isdisjoint(TOP_WORDS):
        schema = merge_top(schema, steps, changes)
    if schema.get("type") != "object":
        schema = {**schema, "type": "object"} if "type" in schema else {"type": "object", **schema}
        changes.append("type made object")
    if not isinstance(schema.get("properties"), dict):
        schema["properties"] = {}
        changes.append("properties added")
    return schema


def read_schema(given: Any, name: str, steps: List[int], notes: List[str]) -> Json:
    """A tool's parameters as they are sent; none at all are an object without properties."""
    if given is None:
        return {"type": "object", "properties": {}}
    changes: List[str] = []
    schema = make_object(given, steps, changes)
    if not is_regular(schema):
        schema = change_schemas(schema, lambda inner: regulate(inner, changes))
    for change in dict.fromkeys(changes):
        add_note(notes, "schema", "of tool %s: %s" % (name, change))
    return schema


# === CLIENT TOOLS (pure) ====================================================
# Tools that a vendor documents and the client runs, offered as functions with
# the documented parameters (Anthropic's tool reference, OpenAI's tool guides).
# Anthropic's types end with a date, and their calls are ordinary ones; OpenAI's
# come back as items of their own (RESPONSES ITEMS).  A table has a line for each
# parameter: its name (with ? where it is optional), type, and description.

PARAMETER_TYPES: Dict[str, Json] = {
    "strings": {"type": "array", "items": {"type": "string"}},
    "integers": {"type": "array", "items": {"type": "integer"}},
    "points": {"type": "array", "items": {"type": "object", "properties": {
        "x": {"type": "integer"}, "y": {"type": "integer"}}, "required": ["x", "y"]}},
    "variables": {"type": "object", "additionalProperties": {"type": "string"}}}
BASH = """command? string The command; required unless the session is restarted.
restart? boolean True restarts the session."""
EDITOR = """command view|create|str_replace|insert What to do.
path string Absolute path of the file or directory.
view_range? integers For view: the first and the last line, counted from 1; -1 is the end.
file_text? string For create: the whole content of the file.
old_str? string For str_replace: the text to replace, exactly as it stands.
new_str? string For str_replace: the text to put in its place.
insert_line? integer For insert: the line after which the text goes; 0 is the beginning.
insert_text? string For insert: the text to insert."""
OLD_EDITOR = EDITOR.rpartition("\n")[0].replace("insert What", "insert|undo_edit What").replace(
    "For str_replace: the text to put in its place.", "For str_replace and insert: the new text.")
MEMORY = EDITOR.replace("insert W", "insert|delete|rename W").replace("path s", "path? s") + """
old_path? string For rename: the present path.
new_path? string For rename: the new path."""
COMPUTER_PARAMETERS = {
    "coordinate": "integers x and y in pixels from the top left corner.",
    "start_coordinate": "integers x and y where the drag begins.",
    "text": "string The text to type, or the keys to press or to hold (ctrl+s).",
    "duration": "number Seconds.", "scroll_direction": "up|down|left|right Where to.",
    "scroll_amount": "integer Clicks of the scroll wheel.",
    "region": "integers x0, y0, x1 and y1 of the part to show enlarged.",
    "repeat": "integer How often the key is pressed."}      # in the toolset alone
CLICK = "coordinate? text?"
COMPUTER_ACTIONS = {        # the parameters of each; the first ten are those of 20241022
    "key": "text repeat?", "type": "text", "mouse_move": "coordinate", "left_click": CLICK,
    "left_click_drag": "start_coordinate coordinate text?", "right_click": CLICK,
    "middle_click": CLICK, "double_click": CLICK, "screenshot": "", "cursor_position": "",
    "hold_key": "text duration", "left_mouse_down": "", "left_mouse_up": "", "triple_click": CLICK,
    "scroll": "scroll_direction scroll_amount coordinate? text?", "wait": "duration",
    "zoom": "region"}
SHELL = """commands strings The commands, to run in order.
timeout_ms? integer Time limit in milliseconds.
max_output_length? integer Most characters of output to return."""
LOCAL_SHELL = """command strings The program and its arguments.
env? variables Environment variables.
working_directory? string Where to run it.
timeout_ms? integer Time limit in milliseconds.
user? string The user to run it as."""
PATCH = """type create_file|update_file|delete_file The operation.
path string Path of the file, from the root of the workspace.
diff? string For create_file and update_file: the diff, without file headers.  Lines of a new file \
begin with +.  In an update each section begins with @@, lines that stay begin with a space, \
removed ones with - and added ones with +."""
ITEM_ACTION = """type click|double_click|drag|keypress|move|screenshot|scroll|type|wait The action.
x? integer Pixels from the left.
y? integer Pixels from the top.
button? left|right|wheel|back|forward For click.
keys? strings Keys to press, or to hold during another action.
path? points For drag: the points to pass.
scroll_x? integer Pixels.
scroll_y? integer Pixels.
text? string For type: the text."""
COMPUTER_WORDS = "Control a computer by its screen, mouse and keyboard."


@lru_cache(maxsize=64)          # there are no more tables than that
def make_parameters(table: str) -> Json:
    """The schema of a table of parameters; it is shared, so nobody may change it."""
    properties, required = {}, []
    for name, kind, words in (line.split(None, 2) for line in table.splitlines()):
        schema = PARAMETER_TYPES.get(kind, {"type": kind})
        if "|" in kind:
            schema = {"type": "string", "enum": kind.split("|")}
        properties[name.rstrip("?")] = {**schema, "description": words}
        required += [name] if not name.endswith("?") else []
    return {"type": "object", "properties": properties,
            **({"required": required} if required else {})}


ITEM_TOOLS: Dict[str, Tuple[str, Json]] = {     # OpenAI's: descriptions and parameters
    "shell": ("Run shell commands and see what they print.", make_parameters(SHELL)),
    "local_shell": ("Run a command on the user's machine.", make_parameters(LOCAL_SHELL)),
    "apply_patch": ("Create, update or delete one file.", make_parameters(PATCH)),
    "tool_search": ("Search for further tools.", make_parameters("query string The search.")),
    "computer_use_preview": (COMPUTER_WORDS, make_parameters(ITEM_ACTION)),
    "computer": (COMPUTER_WORDS, {"type": "object", "properties": {"actions": {
        "type": "array", "items": make_parameters(ITEM_ACTION)}}, "required": ["actions"]})}


def editor_tool(entry: Json, date: int) -> Tuple[str, str, str]:
    """(name, description, table of parameters) of Anthropic's text editor; before 20250429 it has
    undo_edit, and new_str for an insert."""
    words, limit = "View, create and edit text files.", entry.get("max_characters")
    if isinstance(limit, int):
        words += " A view shows at most %d characters." % limit
    if date < 20250429:
        return "str_replace_editor", words, OLD_EDITOR
    return "str_replace_based_edit_tool", words, EDITOR


def computer_tool(entry: Json, date: int) -> Tuple[str, str, str]:
    """Anthropic's computer tool; zoom is one of its actions where the client enables it."""
    actions, names = list(COMPUTER_ACTIONS), list(COMPUTER_PARAMETERS)[:-1]
    if not entry.get("enable_zoom"):
        del actions[-1], names[-1]
    if date < 20250124:
        actions, names = actions[:10], ["coordinate", "text"]
    size = [entry.get("display_width_px"), entry.get("display_height_px")]
    words = " The screen is %s pixels wide and %s pixels high." % (*size,) if all(size) else ""
    return "computer", COMPUTER_WORDS + words, "\n".join(
        ["action %s The action." % "|".join(actions),
         *("%s? %s" % (name, COMPUTER_PARAMETERS[name]) for name in names)])


DATED_TOOLS: Dict[str, Callable[[Json, int], Tuple[str, str, str]]] = {
    "bash_": lambda entry, date: ("bash", "Run a command in a bash session that persists.", BASH),
    "memory_": lambda entry, date: (
        "memory", "Keep notes in files below /memories, which last from one conversation to the "
        "next. View /memories before you begin a task.", MEMORY),
    "text_editor_": editor_tool, "computer_": computer_tool}


def read_dated_tool(entry: Json, path: str, notes: List[str]) -> List[Tool]:
    """Anthropic's client tools, also of dates to come."""
    family, date = entry["type"][:-8], int(entry["type"][-8:])
    name, words, table = DATED_TOOLS[family](entry, date)
    return [Tool(get(entry, "name", "a string", path) or name, words, make_parameters(table),
                 read_cache(entry, path))]


TOOLSET = {action: Tool(action, "%s Action: %s." % (COMPUTER_WORDS, action), make_parameters(
    "\n".join("%s %s" % (name, COMPUTER_PARAMETERS[name.rstrip("?")]) for name in names.split())),
    namespace="computer") for action, names in COMPUTER_ACTIONS.items()}


def read_toolset(entry: Json, path: str, notes: List[str]) -> List[Tool]:
    """Anthropic's computer toolset: each action is a tool, unless `configs` disables it."""
    configs = get(entry, "configs", "an object", path) or {}
    tools = [tool for action, tool in TOOLSET.items()
             if object_in(configs, action).get("enabled") is not False]
    return tools[:-1] + [tool._replace(cache=read_cache(entry, path)) for tool in tools[-1:]]


def read_hosted_tool(entry: Json, path: str, notes: List[str]) -> List[Tool]:
    """What only the vendor can run: not offered, but a choice may name it."""
    kind = entry["type"]
    name = get(entry, "name", "a string", path) or kind
    add_note(notes, "left_out", "tool %s (%s)" % (name, kind))
    return [Tool(name, "", {}, type=HOSTED)]


def is_run_by_vendor(entry: Json) -> bool:
    """Whether a tool is a shell in a container, or a search that is not left to the client."""
    if entry["type"] == "tool_search":
        return entry.get("execution") != "client"
    return object_in(entry, "environment").get("type") not in (None, "local")


def read_item_tool(entry: Json, path: str, notes: List[str]) -> List[Tool]:
    """OpenAI's client tools, with their settings in the description."""
    if is_run_by_vendor(entry):
        return read_hosted_tool(entry, path, notes)
    words, schema = ITEM_TOOLS[entry["type"]]
    settings = {name: entry[name] for name in ("environment", "display_width", "display_height")
                if entry.get(name) not in (None, {"type": "local"})}
    if settings:
        words += " Settings: " + to_json(settings).decode()
    return [Tool(entry["type"], get(entry, "description", "a string", path) or words,
                 entry.get("parameters") or schema, type=entry["type"])]


# === TOOLS (pure) ===========================================================
# Tools and tool_choice of any shape that any API has, read by every face.
# What only a vendor's own service can run (web search, a hosted sandbox) is
# left out with a note: refusing it would refuse the whole request.

DATE = re.compile(r"[0-9]{8}\Z")       # ends the types of Anthropic's tools


def read_function(entry: Json, path: str, notes: List[str]) -> List[Tool]:
    """A function of any API: nested (Chat), flat (Responses, Cursor) or with input_schema."""
    tool, where = unwrap(entry, "function", path)
    name = get(tool, "name", "a string", where)
    if not name:
        raise wrong(where + ".name", "must be a string that is not empty")
    note_ignored(tool, TOOL_FIELDS, notes, "tools.")
    return [Tool(name, get(tool, "description", "a string", where) or "",
                 tool.get("input_schema", tool.get("parameters")), read_cache(entry, path))]


RAW_SCHEMA: Json = {"type": "object", "properties": {"input": {
    "type": "string", "description": "The raw input of the tool, exactly as it wants it."}},
    "required": ["input"], "additionalProperties": False}


def read_custom(entry: Json, path: str, notes: List[str]) -> List[Tool]:
    """OpenAI's custom tool (Codex's apply_patch): a function of one string, its grammar told in
    words.  Anthropic writes `custom` for an ordinary tool."""
    if "input_schema" in entry:
        return read_function(entry, path, notes)
    tool, where = unwrap(entry, "custom", path)
    name = get(tool, "name", "a string", where)
    if not name:
        raise wrong(where + ".name", "must be a string that is not empty")
    note_ignored(tool, TOOL_FIELDS, notes, "tools.")
    description = get(tool, "description", "a string", where) or ""
    rules = get(tool, "format", "an object", where) or {}
    rules = get(rules, "grammar", "an object", where) or rules
    if isinstance(rules.get("definition"), str):
        description += "\n\nThe input follows this %s grammar:\n%s" % (
            rules.get("syntax") or "", rules["definition"])
    return [Tool(name, description.strip(), RAW_SCHEMA, type=CUSTOM)]


def read_namespace(entry: Json, path: str, notes: List[str]) -> List[Tool]:
    """A namespace's tools, each of which remembers it."""
    name = get(entry, "name", "a string", path) or ""
    tools = read_tools(entry.get("tools"), path + ".tools", notes)
    return [tool._replace(namespace=name) for tool in tools]


TOOL_READERS: Dict[str, Callable[[Json, str, List[str]], List[Tool]]] = {
    "function": read_function, "custom": read_custom, "namespace": read_namespace,
    "computer_toolset_": read_toolset,
    **dict.fromkeys(DATED_TOOLS, read_dated_tool), **dict.fromkeys(ITEM_TOOLS, read_item_tool)}


def read_tools(given: Any, path: str, notes: List[str]) -> List[Tool]:
    """Tools of any API, each once, then the hosted ones; schemas are still as given."""
    tools: Dict[Tuple[str, str], Tool] = {}
    hosted: List[Tool] = []
    for index, entry in enumerate(check(given, "a list", path) if given is not None else []):
        here = "%s[%d]" % (path, index)
        kind = get(check(entry, "an object", here), "type", "a string", here) or "function"
        reader = TOOL_READERS.get(DATE.sub("", kind), read_hosted_tool)
        for tool in reader(entry, here, notes):
            if tool.type == HOSTED:
                hosted.append(tool)
            elif tools.setdefault((tool.namespace, tool.name), tool) is not tool:
                add_note(notes, "left_out", "second tool named %s" % tool.name)
    return [*tools.values(), *hosted]


CHOICE_WORDS = {"auto": "auto", "none": "none", "required": "any", "any": "any"}


def read_choice_of_tool(given: Any, notes: List[str],
                        path: str = "tool_choice") -> Optional[Choice]:
    """tool_choice of any API: a word, or an object with a type and perhaps a tool's name."""
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, dict) else given
    if not isinstance(kind, str) or not kind:
        raise wrong(path, "must be a word or an object with a type")
    if kind in CHOICE_WORDS:
        return Choice(CHOICE_WORDS[kind])
    if not isinstance(given, dict):
        raise wrong(path, "must be auto, none, required (any), or name a tool")
    if kind == "allowed_tools":
        return read_allowed_tools(given, notes, path)
    if kind not in ("function", "tool", "custom"):
        return Choice("type", kind)
    named = given.get(kind) if isinstance(given.get(kind), dict) else given
    name = get(named, "name", "a string", path)
    if not name:
        raise wrong(path + ".name", "must name a tool")
    return Choice("tool", name, get(named, "namespace", "a string", path) or "")


def read_allowed_tools(given: Json, notes: List[str], path: str) -> Choice:
    """The choice of some of the tools: nested (Chat) or flat (Responses)."""
    given, path = unwrap(given, "allowed_tools", path)
    mode = get(given, "mode", "a string", path) or "auto"
    if mode not in ("auto", "required"):
        raise wrong(path + ".mode", "must be auto or required")
    allowed = []
    for index, entry in enumerate(get(given, "tools", "a list", path) or []):
        here = "%s.tools[%d]" % (path, index)
        choice = read_choice_of_tool(check(entry, "an object", here), notes, here)
        if choice is None or choice.kind not in ("tool", "type"):
            raise wrong(here, "must name a tool")
        allowed.append(choice)
    if not allowed:
        add_note(notes, "ignored", "tool_choice allowed_tools without tools (all are offered)")
    return Choice(CHOICE_WORDS[mode], allowed=tuple(allowed) or None)


# === MESSAGES TO TURNS (pure) ===============================================
# A list of messages of Chat Completions or Messages, or a mixture, as system
# texts and turns.  Roles are a table.  Results of tools become parts of a user
# turn; putting the history in order is PROMPT REPAIR's work.


def read_system(content: Any, path: str, notes: List[str]) -> List[Text]:
    """System texts in order, without Claude Code's billing line; other parts leave a note."""
    texts: List[Text] = []
    if content is None:
        return texts
    for part in read_content(content, path, notes):
        if not isinstance(part, Text):
            add_note(notes, "dropped", "%s in %s" % (type(part).__name__.lower(), path))
            continue
        if part.text.startswith(BILLING_LINE):
            part = part._replace(text=part.text.partition("\n")[2])
        if not is_blank(part.text):
            texts.append(part)
    return texts


def read_role_content(message: Json, path: str, kinds: Tuple[Any, ...],
                      notes: List[str]) -> List[Part]:
    """A message's parts of the kinds that its role can have; others leave a note."""
    parts = read_content(message.get("content"), path + ".content", notes)
    for part in parts:
        if not isinstance(part, kinds):
            add_note(notes, "dropped", "%s in %s" % (type(part).__name__.lower(), path))
    return [part for part in parts if isinstance(part, kinds)]


def read_user(message: Json, path: str, prompt: Prompt) -> None:
    parts = read_role_content(message, path, (Text, Image, Result), prompt.notes)
    prompt.turns.append(Turn("user", with_cache(parts, read_cache(message, path))))


def read_system_message(message: Json, path: str, prompt: Prompt) -> None:
    texts = read_system(message.get("content"), path + ".content", prompt.notes)
    if texts:
        prompt.turns.append(Turn("system", with_cache(texts, read_cache(message, path))))


def lift_leading_system(prompt: Prompt) -> None:
    """Make the system turns before the first other message system texts; later ones stay, for a
    system text that changes loses the provider's prompt cache.  Where no other message says
    anything, the last one is the user's."""
    if "system" not in [turn.role for turn in prompt.turns]:
        return                  # nearly always
    if not [turn for turn in prompt.turns if turn.parts and turn.role != "system"]:
        prompt.turns = [turn for turn in prompt.turns if turn.parts]
        prompt.turns[-1] = prompt.turns[-1]._replace(role="user")
        add_note(prompt.notes, "repaired", "the last system message is sent as the user's")
    first = 0
    while prompt.turns[first].role == "system":
        prompt.system += prompt.turns[first].parts      # type: ignore[arg-type]
        first += 1
    prompt.turns = [turn._replace(parts=join_texts(turn.parts)) if turn.role == "system" else turn
                    for turn in prompt.turns[first:]]


def join_texts(texts: List[Any]) -> List[Any]:
    """The texts of one message as one, with the last cache_control of theirs."""
    caches = [text.cache for text in texts if text.cache]
    return [Text("\n\n".join(text.text for text in texts), caches[-1] if caches else None)]


def with_cache(parts: List[Any], cache: Optional[Json]) -> List[Any]:
    """Lift a message's own cache_control to its last part."""
    if cache and parts and hasattr(parts[-1], "cache"):
        parts = parts[:-1] + [parts[-1]._replace(cache=cache)]
    return parts


def read_chat_calls(message: Json, path: str, notes: List[str]) -> List[Part]:
    """Chat's tool_calls, functions and custom tools, and the older function_call."""
    calls: List[Part] = []
    for index, call in enumerate(get(message, "tool_calls", "a list", path) or []):
        here = "%s.tool_calls[%d]" % (path, index)
        said = get(check(call, "an object", here), "function", "an object", here)
        if said is None:
            said = get(call, "custom", "an object", here) or {}
            said = {"name": said.get("name"), "arguments": {"input": said.get("input", "")}}
        calls.append(read_function_call(said, get(call, "id", "a string", here) or "",
                                        here + ".function", notes))
    legacy = get(message, "function_call", "an object", path)
    if legacy:
        calls.append(read_function_call(legacy, "function_" + str(legacy.get("name")),
                                        path + ".function_call", notes))
    return calls


def read_function_call(said: Json, call_id: str, path: str, notes: List[str]) -> Call:
    name = get(said, "name", "a string", path) or UNNAMED
    return Call(call_id, name, read_arguments(said.get("arguments"), path + ".arguments", notes))


def read_assistant(message: Json, path: str, prompt: Prompt) -> None:
    """Text, thinking and tool calls, in whichever of the APIs' members they come."""
    parts: List[Part] = []
    thinking = get(message, "reasoning_content", "a string", path) or message.get("reasoning")
    if isinstance(thinking, str) and thinking:
        parts.append(Thinking(thinking))
    parts += read_role_content(message, path, (Thinking, Text, Call), prompt.notes)
    if isinstance(message.get("refusal"), str) and not is_blank(message["refusal"]):
        parts.append(Text(message["refusal"]))
    parts += read_chat_calls(message, path, prompt.notes)
    prompt.turns.append(Turn("assistant", with_cache(parts, read_cache(message, path))))


def read_tool_message(message: Json, path: str, prompt: Prompt) -> None:
    """Chat's `tool` message, and the older `function`, whose call is known by its name."""
    name = get(message, "name", "a string", path) or ""
    call_id = get(message, "tool_call_id", "a string", path)
    if call_id is None:
        call_id = "function_" + name
    parts = read_result_parts(message.get("content"), path + ".content", prompt.notes)
    result = make_result(call_id, parts, False, read_cache(message, path))
    prompt.turns.append(Turn("user", [result._replace(name=name)]))


ROLE_READERS: Dict[str, Callable[[Json, str, Prompt], None]] = {
    "user": read_user, "assistant": read_assistant, "tool": read_tool_message,
    "function": read_tool_message, "system": read_system_message,
    "developer": read_system_message}


def read_message(message: Json, path: str, prompt: Prompt) -> None:
    """A message of any role into the prompt."""
    role = get(message, "role", "a string", path)
    if role not in ROLE_READERS:
        raise wrong(path + ".role", "must be one of " + ", ".join(ROLE_READERS))
    if role not in TOOL_ROLES and not MESSAGE_FIELDS.keys().isdisjoint(message):
        note_ignored(message, MESSAGE_FIELDS, prompt.notes, "message.")
    ROLE_READERS[role](message, path, prompt)


def read_messages(body: Json, prompt: Prompt) -> None:
    """All of `messages` into the prompt.  Raises ProxyError `invalid` with the field's path."""
    messages = get(body, "messages", "a list")
    if not messages:
        raise wrong("messages", "must be a list of at least one message")
    for index, message in enumerate(messages):
        path = "messages[%d]" % index
        read_message(check(message, "an object", path), path, prompt)
    lift_leading_system(prompt)


# === FIELDS OF ANY API (pure) ===============================================
# What the APIs call by different names, read wherever it stands: clients mix
# their members as they mix their parts, and nothing is dropped in silence.

BUDGET_EFFORTS = ((10_000, "high"), (5_000, "medium"), (2_000, "low"))


def read_model_name(body: Json) -> str:
    return get(body, "model", "a string") or ""


def read_positive(body: Json, names: Tuple[str, ...]) -> Optional[int]:
    """The first of these members that is given, as a whole number above 0."""
    for name in names:
        value = get(body, name, "a number")
        if value is not None:
            if value != value or value < 1 or value > 1e12 or value != int(value):
                raise wrong(name, "must be a whole number above 0")
            return int(value)
    return None


def read_finite(body: Json, name: str) -> Optional[float]:
    value = get(body, name, "a number")
    if value is not None and not -1e9 < value < 1e9:
        raise wrong(name, "must be a number of ordinary size")
    return value


def read_stops(given: Any, name: str) -> List[str]:
    """Stop sequences, a string or a list; empty ones are left out.  Raises ProxyError `invalid`."""
    if given is None:
        return []
    single = isinstance(given, str)
    stops = [given] if single else check(given, "a list", name)
    if len(stops) > MAX_STOPS:
        raise wrong(name, "must hold at most %d stop sequences" % MAX_STOPS)
    for index, stop in enumerate(stops):
        path = name if single else "%s[%d]" % (name, index)
        if len(check(stop, "a string", path)) > MAX_STOP_CHARS:
            raise wrong(path, "must be at most %d characters long" % MAX_STOP_CHARS)
    return [stop for stop in stops if stop]


def read_json_format(given: Any, path: str) -> Optional[Json]:
    """response_format, or what has its shape: None for text, {} for any JSON, {"schema": ...}.
    llama.cpp and Together document a `schema` beside json_object too."""
    if given is None:
        return None
    kind = get(check(given, "an object", path), "type", "a string", path)
    if kind in (None, "text"):
        return None
    if kind not in ("json_object", "json_schema"):
        raise wrong(path + ".type", "must be text, json_object or json_schema")
    holder = get(given, "json_schema", "an object", path)
    holder, where = (given, path) if holder is None else (holder, path + ".json_schema")
    schema = get(holder, "schema", "an object", where)
    if schema is None or (kind == "json_object" and not schema):
        return {}
    about = get(holder, "description", "a string", where)
    return {"schema": {"description": about, **schema} if about else schema}


def read_any_tools(body: Json, notes: List[str]) -> List[Tool]:
    """`tools`, or the older `functions`."""
    if body.get("tools") is None and body.get("functions") is not None:
        return read_tools(body["functions"], "functions", notes)
    return read_tools(body.get("tools"), "tools", notes)


def read_any_parallel(body: Json) -> bool:
    """Whether an answer may hold more than one call: parallel_tool_calls, or the opposite in
    Messages' tool_choice."""
    if "tool_choice" not in body and "parallel_tool_calls" not in body:
        return True             # often
    choice = body.get("tool_choice")
    off = isinstance(choice, dict) and get(choice, "disable_parallel_tool_use", "a boolean",
                                           "tool_choice")
    return not off and get(body, "parallel_tool_calls", "a boolean") is not False


def read_any_limit(body: Json, notes: List[str]) -> Optional[int]:
    """The limit of output tokens: 0 asks for an empty answer, -1 for no limit (with a note)."""
    for name in ("max_completion_tokens", "max_tokens", "max_output_tokens"):
        if body.get(name) is None:
            continue
        value = get(body, name, "a number")
        if value != -1:
            return 0 if value == 0 else read_positive(body, (name,))
        add_note(notes, "ignored", "%s -1" % name)
    return None


def read_any_stops(body: Json) -> List[str]:
    name = "stop" if body.get("stop") is not None else "stop_sequences"
    return read_stops(body.get(name), name)


def read_any_format(body: Json) -> Optional[Json]:
    """response_format (Chat), output_config.format (Messages, output_format in its beta) or
    text.format (Responses)."""
    if body.get("response_format") is not None:
        return read_json_format(body["response_format"], "response_format")
    if isinstance(body.get("output_format"), dict):
        return read_json_format(body["output_format"], "output_format")
    for name in ("output_config", "text"):
        holder = body.get(name)
        if isinstance(holder, dict) and holder.get("format") is not None:
            return read_json_format(holder["format"], name + ".format")
    return None


def read_thinking_kind(body: Json) -> str:
    """Messages' thinking.type (R12); "" when it is not asked for."""
    given = get(body, "thinking", "an object")
    if not given:
        return ""
    kind = get(given, "type", "a string", "thinking") or ""
    if kind not in ("", "enabled", "adaptive", "disabled", "between_tools"):
        raise wrong("thinking.type", "must be enabled, adaptive or disabled")
    return "adaptive" if kind == "between_tools" else kind


def openrouter_reasoning(body: Json) -> Json:
    """Return `reasoning` with the types of OpenRouter's members checked: enabled, max_tokens and
    exclude (the model thinks, and the answer does not show it)."""
    given = get(body, "reasoning", "an object") or {}
    if given:
        get(given, "enabled", "a boolean", "reasoning")
        get(given, "max_tokens", "a number", "reasoning")
        get(given, "exclude", "a boolean", "reasoning")
    return given


THINKING_FIELDS = frozenset(("reasoning_effort", "reasoning", "output_config", "thinking"))


def read_effort_word(body: Json) -> Optional[str]:
    """reasoning_effort, reasoning.effort or output_config.effort."""
    effort = get(body, "reasoning_effort", "a string")
    for name in ("reasoning", "output_config"):
        holder = get(body, name, "an object")
        if holder:
            effort = effort or get(holder, "effort", "a string", name)
    return effort


def read_any_effort(body: Json) -> Optional[str]:
    """The effort that is named, or what a budget amounts to; none where OpenRouter's
    reasoning.enabled is false, medium (its default) where it is true."""
    if THINKING_FIELDS.isdisjoint(body):
        return None             # often
    effort, reasoning = read_effort_word(body), openrouter_reasoning(body)
    thinking = get(body, "thinking", "an object") or {}
    budget = get(thinking, "budget_tokens", "a number", "thinking") or 0
    if read_thinking_kind(body) != "enabled":
        budget = reasoning.get("max_tokens")
        if reasoning.get("enabled") is False or (budget is not None and budget < 1 and not effort):
            return "none"
    if effort is None and budget is not None:
        return next((word for least, word in BUDGET_EFFORTS if budget >= least), "low")
    return "medium" if effort is None and reasoning.get("enabled") else effort


def read_any_budget(body: Json) -> Optional[int]:
    """thinking.budget_tokens where thinking was asked for, 0 where that was left open; or
    reasoning.max_tokens."""
    if THINKING_FIELDS.isdisjoint(body):
        return None             # often
    budget, reasoning = 0.0, openrouter_reasoning(body)
    if read_thinking_kind(body) in ("enabled", "adaptive"):
        budget = get(body["thinking"], "budget_tokens", "a number", "thinking") or 0
    elif reasoning.get("enabled") is False or (reasoning.get("max_tokens") or 0) < 1:
        return None
    else:
        budget = reasoning["max_tokens"]
    return int(min(max(budget, 0), MAX_OUTPUT_TOKENS))


# === STRUCTURED OUTPUT (pure) ===============================================
# The upstream has no response_format: the model is told in words what form its
# answer must have, behind all the rest of the system texts.

JSON_ANY = ("Answer with one JSON object and nothing else: no text before or after it, no code "
            "fence.")
JSON_SCHEMA = ("Answer with one JSON value that is valid under this JSON Schema and nothing else: "
               "no text before or after it, no code fence.\n%s")


def add_format_instruction(prompt: Prompt) -> None:
    """Ask for the JSON format that the prompt wants, if it wants one."""
    if prompt.json_format is None:
        return
    schema = prompt.json_format.get("schema")
    words = JSON_ANY if schema is None else JSON_SCHEMA % to_json(schema).decode()
    prompt.system.append(Text(words))
    add_note(prompt.notes, "json_format", "asked for in words")


# === TOOL NAMES (pure) ======================================================
# Names that every provider takes, for tools, calls, results and the choice;
# `prompt.names` tells the answer's filters what the client calls them, with
# their namespace and their type.

SAFE_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,%d}" % MAX_TOOL_NAME)


def safe_tool_name(own: ToolName, taken: Mapping[str, Any]) -> str:
    """A name that every provider takes, different from those in `taken`."""
    wanted = "%s__%s" % (own.namespace, own.name) if own.namespace else own.name
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", wanted)[:MAX_TOOL_NAME] or "_"
    if safe != wanted or safe in taken:
        identity = "%s\n%s" % (own.namespace, own.name)
        digest = hashlib.sha256(identity.encode("utf-8", "replace")).hexdigest()[:8]
        safe = "%s_%s" % (safe[:MAX_TOOL_NAME - 9], digest)
    return safe


def used_names(prompt: Prompt) -> Dict[Tuple[str, str], ToolName]:
    """Every tool that is offered or was called, by namespace and name."""
    used = {(tool.namespace, tool.name): ToolName(tool.name, tool.namespace, tool.type)
            for tool in prompt.tools}
    for turn in prompt.turns:
        for part in turn.parts:
            if isinstance(part, Call):
                used.setdefault((part.namespace, part.name), ToolName(part.name, part.namespace))
    return used


def map_tool_names(prompt: Prompt) -> None:
    """Give tools, calls and the choice names that providers take; `prompt.names` maps back."""
    used = used_names(prompt)
    if all(SAFE_TOOL_NAME.fullmatch(own.name) and not own.namespace and own.type == FUNCTION
           for own in used.values()):
        return
    sent: Dict[Tuple[str, str], str] = {}
    for identity, own in used.items():
        sent[identity] = safe_tool_name(own, prompt.names)
        prompt.names[sent[identity]] = own
        if sent[identity] != own.name:
            add_note(prompt.notes, "renamed", "tool %s -> %s" % (own.name, sent[identity]))
    prompt.tools = [tool._replace(name=sent[tool.namespace, tool.name]) for tool in prompt.tools]
    prompt.turns = [Turn(turn.role, [part._replace(name=sent[part.namespace, part.name])
                                     if isinstance(part, (Call, Result)) else part
                                     for part in turn.parts]) for turn in prompt.turns]
    choice = prompt.choice
    if choice and (choice.namespace, choice.name) in sent:
        prompt.choice = Choice("tool", sent[choice.namespace, choice.name])


# === TOOL CHOICE (pure) =====================================================
# Which of a request's tools are offered, and which of them must be called: a
# choice names tools of the request, by name or by type.  One that only its
# vendor can run cannot be chosen, for it is not offered.


def offered_tools(prompt: Prompt) -> List[Tool]:
    """The tools that can be offered, each once: a search may find what is known."""
    offered: Dict[Tuple[str, str], Tool] = {}
    for tool in prompt.tools:
        if tool.type != HOSTED:
            offered.setdefault((tool.namespace, tool.name), tool)
    return list(offered.values())


def tool_family(name: str) -> str:
    """A vendor's name of a kind of tools, whichever its version: web_search, computer."""
    return re.sub(r"(_use)?(_preview)?(_20[0-9_]+)?\Z", "", name, count=1)


def find_tools(prompt: Prompt, choices: Iterable[Choice]) -> List[Tool]:
    """The tools that choices name, with a note for each that is not offered anyway.  Raises
    ProxyError `invalid` where the request has none such."""
    known: Dict[Tuple[str, str, str], Tool] = {}
    for tool in sorted(prompt.tools, key=lambda tool: tool.type == HOSTED):
        known.setdefault(("tool", tool.namespace, tool.name), tool)
        known.setdefault(("tool", "", tool.name), tool)
        if tool.type not in (FUNCTION, CUSTOM):
            known.setdefault(("type", "", tool_family(tool.name)), tool)
    found = []
    for choice in choices:
        named = known.get(("tool", choice.namespace, choice.name))
        if named is None and choice.kind == "type":
            named = known.get(("type", "", tool_family(choice.name)))
        if named is None:
            names = ", ".join(own_words(tool.name, MAX_TOOL_NAME) for tool in prompt.tools[:20])
            raise wrong("tool_choice", "names the tool %s, which is not one of tools (%s)" % (
                own_words(choice.name, 2 * MAX_TOOL_NAME), names or "there are none"))
        found.append(named)
    for named in found:
        if named.type == HOSTED:
            add_note(prompt.notes, "ignored", "tool_choice %s, which is not offered" % named.name)
    return found


def settle_choice(prompt: Prompt) -> None:
    """The tools that are offered, and a choice that these allow: `none` takes them away, for the
    upstream refuses that word.  Raises ProxyError `invalid` for a tool that is not there."""
    choice, offered = prompt.choice, offered_tools(prompt)
    if choice is None:
        prompt.tools = offered
        return
    if choice.kind in ("tool", "type"):
        tool, = find_tools(prompt, [choice])
        choice = Choice("auto") if tool.type == HOSTED else Choice(
            "tool", tool.name, tool.namespace)
    elif choice.allowed is not None:
        allowed = set(map(id, find_tools(prompt, choice.allowed)))
        offered = [tool for tool in offered if id(tool) in allowed]
    elif choice.kind == "none":
        offered = []
    if choice.kind == "any" and not offered:
        add_note(prompt.notes, "ignored", "tool_choice without tools")
    prompt.choice = choice._replace(allowed=None) if offered else None
    prompt.tools = offered


# === PROMPT REPAIR (pure) ===================================================
# A history made fit for any upstream, always in the same way, so that a prompt
# has the same beginning on every turn and the upstream's cache keeps hitting:
# parts in order, every call answered once and right behind its turn, ids
# unique, names that every provider takes, pictures of tools shown by the user.

NO_RESULT = "(no result: the call was interrupted)"


def order_parts(parts: List[Part]) -> List[Part]:
    """An assistant's parts as the upstream wants them: thinking, then text, then calls."""
    return [part for kind in (Thinking, Text, Call) for part in parts if isinstance(part, kind)]


def merge_assistants(turns: List[Turn]) -> List[Turn]:
    """Neighbouring assistant turns made one, empty turns left out.  System turns behind calls wait
    until the assistant's next parts, perhaps more calls, are merged: nothing may separate calls
    from their results."""
    merged: List[Turn] = []
    waiting: List[Turn] = []
    for turn in turns:
        behind_assistant = bool(merged) and merged[-1].role == "assistant"
        if not turn.parts:
            continue
        if turn.role == "assistant" and behind_assistant:
            merged[-1].parts.extend(turn.parts)
        elif turn.role == "system" and behind_assistant and (waiting or any(
                isinstance(part, Call) for part in merged[-1].parts)):
            waiting.append(turn)
        else:
            merged += [*waiting, Turn(turn.role, list(turn.parts))]
            waiting = []
    return merged + waiting


def unique_id(wanted: str, taken: Dict[str, int]) -> str:
    """The id wanted, or with a number behind it where it is empty or taken.  `taken` counts the
    uses of each id, so that a thousand equal ones cost linear time."""
    candidate = wanted = wanted or "call"
    while candidate in taken:
        taken[wanted] += 1
        candidate = "%s_%d" % (wanted, taken[wanted])
    taken[candidate] = 1
    return candidate


def answer_calls(calls: List[Tuple[str, Call]], results: List[Result],
                 notes: List[str]) -> Tuple[List[Part], Set[int]]:
    """One result for each call, by its id, and the identities of those that are left over.  `calls`
    pairs the client's own id of a call with the call under its unique id."""
    by_id: Dict[str, List[Result]] = {}
    for result in reversed(results):
        by_id.setdefault(result.id, []).append(result)
    answers: List[Part] = []
    for own_id, call in calls:
        found = by_id[own_id].pop() if by_id.get(own_id) else None
        if found is None:
            add_note(notes, "repaired", "call of %s without a result" % call.name)
            found = Result(call.id, NO_RESULT)
        answers.append(found._replace(id=call.id, name=call.name, namespace=call.namespace))
    return answers, {id(result) for left in by_id.values() for result in left}


def result_text(result: Result) -> str:
    """A result's text, marked as an error where it is one and does not say so itself."""
    if not result.is_error:
        return result.text
    opening = result.text[:40].lstrip("<[( ").lower()
    told = opening.startswith(("error", "tool_use_error"))
    return result.text if told else "Error: " + result.text


def show_images(results: Iterable[Any]) -> List[Turn]:
    """A user turn with the pictures that tools gave: inside a result the upstream drops them."""
    parts: List[Part] = []
    for result in results:
        if result.images:
            parts.append(Text("Pictures returned by the tool %s:" % (result.name or "call")))
            parts += result.images
    return [Turn("user", parts)] if parts else []


def settle_users(users: List[Turn], calls: List[Tuple[str, Call]],
                 notes: List[str]) -> List[Turn]:
    """The user and system turns that follow an assistant's: first all results of its calls, then
    the rest."""
    results = [part for turn in users for part in turn.parts if isinstance(part, Result)]
    answers, orphans = answer_calls(calls, results, notes)
    shown = show_images(answers)
    if shown:
        answers = [answer._replace(images=()) for answer in answers]    # type: ignore[call-arg]
    settled = [Turn("tool", answers)] if answers else []
    settled += shown
    for turn in users:
        parts: List[Part] = []
        for part in turn.parts:
            if not isinstance(part, Result):
                parts.append(part)
            elif id(part) in orphans:
                add_note(notes, "repaired", "result of an unknown call")
                parts.append(Text("[Result of an earlier tool call] " + result_text(part)))
                parts += part.images
        if parts:
            settled.append(Turn(turn.role, parts))
    return settled


def repair_turns(turns: List[Turn], notes: List[str]) -> List[Turn]:
    """The whole history, repaired; roles are then user, assistant, system and tool.  Calls get
    unique ids, and stand beside the client's own until their results have come."""
    repaired: List[Turn] = []
    taken: Dict[str, int] = {}
    users: List[Turn] = []
    calls: List[Tuple[str, Call]] = []
    for turn in merge_assistants(turns):
        if turn.role != "assistant":
            users.append(turn)
            continue
        repaired += [*settle_users(users, calls, notes), turn]
        users, calls = [], []
        for index, part in enumerate(turn.parts):
            if not isinstance(part, Call):
                continue
            own_id, unique = part.id, unique_id(part.id, taken)
            if own_id != unique:
                part = turn.parts[index] = part._replace(id=unique)
            if own_id not in ("", unique):
                add_note(notes, "repaired", "tool call id used twice")
            calls.append((own_id, part))
    return repaired + settle_users(users, calls, notes)


def refuse_unreadable(prompt: Prompt) -> None:
    """A newest user turn that holds nothing but parts which cannot be shown is a 400; earlier ones
    are not, nor is one with a result of a tool, for the client could not go on."""
    for turn in reversed(prompt.turns):
        if turn.role == "user" and turn.parts:
            faults = [getattr(part, "fault", None) for part in turn.parts]
            if all(faults):
                raise faults[0]
            return


def repair_prompt(prompt: Prompt) -> None:
    """Everything above, in order.  Raises ProxyError `invalid` when nothing is left to answer."""
    refuse_unreadable(prompt)
    settle_choice(prompt)
    steps = [MAX_MERGE_STEPS]
    prompt.tools = [tool._replace(schema=read_schema(tool.schema, tool.name, steps, prompt.notes))
                    for tool in prompt.tools]
    prompt.turns = repair_turns(prompt.turns, prompt.notes)
    if not prompt.turns:
        raise wrong(prompt.source, "must hold at least one message that is not empty")
    if prompt.turns[-1].role == "assistant":
        add_note(prompt.notes, "prefill", "the model starts anew and does not go on from it")
    map_tool_names(prompt)
    add_format_instruction(prompt)


def first_user_text(prompt: Prompt) -> str:
    """The first user message that is not a tool's result: what a conversation is known by."""
    for turn in prompt.turns:
        if turn.role == "user":
            return "\n".join(part.text if isinstance(part, Text) else part.url[:4096]
                             for part in turn.parts if isinstance(part, (Text, Image)))
    return ""


# === TOKEN COUNT (pure) =====================================================
# A local estimate of tokens, for the figure that Messages wants before the
# upstream has told one.  Three kinds of text differ most: words, symbols (code,
# JSON, digits) and scripts that take about a token a character.  Long prompts
# are judged by the beginnings of all their texts, so that 8 MB cost no more
# than 80 KB.

SAMPLE_CHARS = 64 * KIB         # a longer prompt is judged by this much of it
IMAGE_TOKENS = (280, 1600)      # least and most that vendors count for a picture
PIXELS_PER_TOKEN = 750          # between those (Anthropic's vision guide)
PART_TOKENS = 4                 # roles and separators around each part
WORD_CHARS = re.compile(r"[A-Za-z \n]+")
WIDE_CHARS = ("[\u1100-\u11ff\u2e80-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff"
              "\uff00-\uffef\U0001f000-\U0003ffff]")     # a pattern that takes 2 ms: at first use


def texts_tokens(texts: List[str]) -> float:
    """Estimated tokens of many texts together."""
    total = sum(map(len, texts))
    if total > SAMPLE_CHARS:
        share = SAMPLE_CHARS / total
        texts = [text[:8 + int(len(text) * share)] for text in texts]
    sample = "".join(texts)
    words = sum(map(len, WORD_CHARS.findall(sample)))
    wide = 0 if sample.isascii() else len(re.findall(WIDE_CHARS, sample))
    tokens = words / 4.6 + wide * 0.9 + (len(sample) - words - wide) / 2.2
    return tokens * total / max(1, len(sample))


def image_tokens(image: Image) -> int:
    """Estimated tokens of a picture: by its size in pixels where its head tells (PNG), else by
    its bytes, taken as a photograph's."""
    start = image.url.find(",") + 1
    try:
        head = base64.b64decode(image.url[start:start + 32])
    except ValueError:
        head = b""
    pixels = (len(image.url) - start) * 4
    if head[12:16] == b"IHDR":
        pixels = int.from_bytes(head[16:20], "big") * int.from_bytes(head[20:24], "big")
    return min(max(pixels // PIXELS_PER_TOKEN, IMAGE_TOKENS[0]), IMAGE_TOKENS[1])


def images_of(prompt: Prompt) -> List[Image]:
    """All pictures of a prompt."""
    shown: List[Image] = []
    for turn in prompt.turns:
        for part in turn.parts:
            if part.__class__ is Image:
                shown.append(part)
            elif part.__class__ is Result:
                shown += part.images
    return shown


def part_texts(part: Part) -> List[str]:
    """The texts that a part of a turn is counted by."""
    if isinstance(part, Image):
        return []
    if isinstance(part, Call):
        return [part.name, *map(str, part.arguments), *map(str, part.arguments.values())]
    return [part.text]


def estimate_input(prompt: Prompt) -> int:
    """Estimated input tokens of a whole request, at least 1."""
    parts = [part for turn in prompt.turns for part in turn.parts]
    texts = [text.text for text in prompt.system]
    texts += [text for part in parts for text in part_texts(part)]
    for tool in prompt.tools:
        texts += [tool.name, tool.description, to_json(tool.schema).decode()]
    pieces = len(parts) + len(prompt.system) + 3 * len(prompt.tools)
    images = sum(map(image_tokens, images_of(prompt)))
    return max(1, round(texts_tokens(texts) + PART_TOKENS * pieces + images))


class Calibration(NamedTuple):
    """What the true counts of a family of models taught: fading sums over answers of the raw
    estimate x and the true count y, and the fading mean of the relative error."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    error: float = 0.0


FADING = 0.95               # an answer counts half after fourteen more
SLOPES = (0.2, 5.0)         # tokens per estimated token: what is beyond is an accident


def calibrated(estimate: float, known: Calibration) -> int:
    """A raw estimate corrected by what is known: a line through the true counts, as far as they
    lie on one, else their ratio."""
    if not known.weight:
        return max(1, round(estimate))
    mean_x, mean_y = known.x / known.weight, known.y / known.weight
    variance = known.xx / known.weight - mean_x * mean_x
    ratio = mean_y / max(mean_x, 1.0)
    if variance <= (0.05 * mean_x) ** 2:        # all alike: what differs is an overhead
        return max(1, round(mean_y + min(max(ratio, 0.5), 2.0) * (estimate - mean_x)))
    slope = (known.xy / known.weight - mean_x * mean_y) / variance
    line = mean_y + slope * (estimate - mean_x)
    sound = SLOPES[0] <= slope <= SLOPES[1] and line > 0
    return max(1, round(line if sound else ratio * estimate))


def learn_count(known: Calibration, estimate: float, true: int) -> Calibration:
    """What is known after one more answer."""
    error = min(abs(calibrated(estimate, known) - true) / max(true, 1), 10.0)
    return Calibration(known.weight * FADING + 1, known.x * FADING + estimate,
                       known.y * FADING + true, known.xx * FADING + estimate * estimate,
                       known.xy * FADING + estimate * true,
                       known.error * 0.8 + error * 0.2 if known.weight else error)


def model_family(model: str, tools: bool) -> str:
    """What is calibrated together: a maker's models, with tools (which have a preamble) apart."""
    found = re.match(r"[a-z]+", model.lower().rpartition("/")[2])
    return "%s%s" % (found[0] if found else "other", "+tools" if tools else "")


def estimate_output(characters: int) -> int:
    """Estimated tokens of an answer of so many characters."""
    return max(1, round(characters / 4))


# === JSON SCHEMA (pure) =====================================================
# Whether a value is valid under a schema, for structured output: the subset of
# JSON Schema that structured outputs use, and its first violation in words that
# a model can act on.  What cannot be judged (a keyword or a reference that is not
# followed here, no steps left) counts as valid and is a doubt: `not` and oneOf
# make no violation of it.  `pattern` is left out: a hostile one could run for ever.

SCHEMA_TYPES: Dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool,
                                "number": (int, float), "integer": (int, float), "null": type(None)}
MAX_SCHEMA_STEPS = 20_000       # a schema that refers to itself must end somewhere


class Schema(NamedTuple):
    """A schema at work: `root` resolves references, `steps` counts down what may be checked,
    `doubts` counts what could not be judged."""

    root: Any
    steps: List[int]
    doubts: List[int]


def has_type(value: Any, name: Any) -> bool:
    """Whether a value is of a JSON Schema type; a whole float is an integer there."""
    kind = SCHEMA_TYPES.get(name)
    if kind is None:
        return True
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, kind) and (name != "integer" or value == int(value))


def check_type(value: Any, schema: Json, path: str, work: Schema) -> Iterator[str]:
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or value is None and schema.get("nullable") is True:
        return
    known = [kind for kind in kinds if kind in SCHEMA_TYPES]
    if any(has_type(value, kind) for kind in known):
        return
    if kinds and known == kinds:
        yield "%s must be of type %s" % (path, " or ".join(kinds))
    else:
        work.doubts[0] += 1


def check_choices(value: Any, schema: Json, path: str, work: Schema) -> Iterator[str]:
    for keyword, words in (("enum", "one of "), ("const", "")):
        wanted = schema.get(keyword)
        allowed = wanted if keyword == "enum" else [wanted]
        if keyword in schema and isinstance(allowed, list) and not any(
                same_value(value, one) for one in allowed):
            text = json.dumps(wanted)
            work.steps[0] -= len(text) // 100       # work too: `not` and anyOf do it often
            yield "%s must be %s%s" % (path, words, text[:300])


def same_value(one: Any, other: Any) -> bool:
    """Equality as JSON has it: 1 is 1.0, but true is not 1, at any depth."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_value, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_value(one[name], other[name])
                                                  for name in one)
    return bool(one == other)


BOUNDS: Tuple[Tuple[str, str, Callable[[Any, Any], bool], str], ...] = (
    # keyword, type it is for, whether a number or a size fits, words
    ("minimum", "number", ge, "at least"), ("maximum", "number", le, "at most"),
    ("exclusiveMinimum", "number", gt, "above"), ("exclusiveMaximum", "number", lt, "below"),
    ("minLength", "string", ge, "of length at least"),
    ("maxLength", "string", le, "of length at most"),
    ("minItems", "array", ge, "of length at least"), ("maxItems", "array", le, "of length at most"),
    ("minProperties", "object", ge, "of size at least"),
    ("maxProperties", "object", le, "of size at most"))


def check_bounds(value: Any, schema: Json, path: str, work: Schema) -> Iterator[str]:
    """Numbers within their range, strings, lists and objects within their size."""
    for keyword, kind, fits, words in BOUNDS:
        bound = schema.get(keyword)
        if bound is not None and has_type(bound, "number") and has_type(value, kind) \
                and not fits(value if kind == "number" else len(value), bound):
            yield "%s must be %s %s" % (path, words, bound)


def check_object(value: Any, schema: Json, path: str, work: Schema) -> Iterator[str]:
    """Required, known and additional members."""
    if not isinstance(value, dict):
        return
    for name in list_in(schema, "required"):
        if isinstance(name, str) and name not in value:
            yield "%s lacks the member %s" % (path, json.dumps(name))
    rest = schema.get("additionalProperties", True)
    if "patternProperties" in schema or not isinstance(schema.get("properties", {}), dict):
        rest = True
    known = object_in(schema, "properties")
    for name, item in value.items():
        yield from check_value(item, known.get(name, rest), "%s.%s" % (path, name), work)


def check_array(value: Any, schema: Json, path: str, work: Schema) -> Iterator[str]:
    """Each item under its schema."""
    first = list_in(schema, "prefixItems")
    for index, item in enumerate(value if isinstance(value, list) else []):
        under = first[index] if index < len(first) else schema.get("items", True)
        yield from check_value(item, under, "%s[%d]" % (path, index), work)


def check_combined(value: Any, schema: Json, path: str, work: Schema) -> Iterator[str]:
    """allOf, anyOf, oneOf, not and $ref."""
    under = list(schema.get("allOf", ()))
    if "$ref" in schema:
        found = resolve_reference(schema["$ref"], work.root)
        under.insert(0, None if found is True else found)
    for one in under:
        yield from check_value(value, one, path, work)
    for keyword in ("anyOf", "oneOf"):
        judged = [judge_value(value, one, path, work) for one in schema.get(keyword) or []]
        if judged and all(problem for problem, _ in judged):
            yield "%s fits none of %s: %s" % (path, keyword, judged[0][0])
        if keyword == "oneOf" and judged.count((None, True)) > 1:
            yield "%s fits more than one of oneOf" % path
    if "not" in schema and judge_value(value, schema["not"], path, work) == (None, True):
        yield "%s must not be what `not` describes" % path


def judge_value(value: Any, schema: Any, path: str, work: Schema) -> Tuple[Optional[str], bool]:
    """The first violation of a schema, and whether there was no doubt."""
    before = work.doubts[0]
    return next(check_value(value, schema, path, work), None), work.doubts[0] == before


CHECKS = (check_type, check_choices, check_bounds, check_object, check_array, check_combined)
KEYWORDS = {name: kinds.split() for kinds, names in (       # and the types of their values
    ("string array", "type"), ("array", "enum required prefixItems allOf anyOf oneOf"),
    ("object", "properties"), ("object boolean", "additionalProperties items not"),
    ("string", "$ref"), ("number", " ".join(row[0] for row in BOUNDS)),
    ("any", "const $schema $id $anchor $comment $defs definitions title description default "
            "deprecated examples readOnly writeOnly")) for name in names.split()}


def check_value(value: Any, schema: Any, path: str, work: Schema) -> Iterator[str]:
    """The violations of a schema: nobody takes more than the first, so the others cost nothing."""
    work.steps[0] -= 1
    if work.steps[0] < 0 or not isinstance(schema, (dict, bool)):
        work.doubts[0] += 1
        return
    if schema is False:
        yield "%s must not be there" % path
    if isinstance(schema, bool):
        return
    work.steps[0] -= sum(len(part) for part in schema.values() if isinstance(part, list))
    work.doubts[0] += not all(any(has_type(given, kind) for kind in KEYWORDS.get(keyword, ()))
                              for keyword, given in schema.items())
    if isinstance(schema.get("$id"), str) and not schema["$id"].startswith("#"):
        work = work._replace(root=schema)       # references within are relative to it
    for one in CHECKS:
        yield from one(value, schema, path, work)


# === STRUCTURED ANSWERS (pure) ==============================================
# Whether a finished answer has the JSON form that was asked for, and what is
# said to the model when it has not: its answer, and what is wrong with it.


def find_violation(text: str, schema: Any) -> Optional[str]:
    """What is wrong with a JSON text under a schema (None: any JSON), None when nothing is."""
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        return "the answer is not JSON: %s" % printable(str(error), 200)
    if schema is None:
        return None
    try:
        return next(check_value(value, schema, "$", Schema(schema, [MAX_SCHEMA_STEPS], [0])), None)
    except (RecursionError, TypeError, ValueError, OverflowError):
        return None         # a schema that cannot be checked is not the answer's fault


def has_checked_format(prompt: Prompt) -> bool:
    """Whether the answer must be valid under a schema, and can still be asked for again."""
    return not prompt.stream and (prompt.json_format is not None or forced_json(prompt) is not None)


def forced_json(prompt: Prompt) -> Optional[Tool]:
    """The AI SDK's way to structured output: one tool `json` that must be called (R13)."""
    if prompt.choice and prompt.choice.kind in ("any", "tool") and len(prompt.tools) == 1 \
            and prompt.tools[0].name == "json":
        return prompt.tools[0]
    return None


def format_violation(prompt: Prompt, reply: Reply) -> Optional[str]:
    """What is wrong with a finished answer under the schema that was asked for."""
    if reply.of_kind(REFUSAL):
        return None             # takes the place of an answer; asking again changes nothing
    tool = forced_json(prompt)
    if tool is not None:
        calls = [block.text for block in reply.of_kind(TOOL) if block.whole]
        return find_violation(calls[0], tool.schema) if calls else "the tool was not called"
    if reply.reason != STOP or prompt.json_format is None:
        return None
    text = "".join(block.text for block in reply.of_kind(TEXT))
    return find_violation(text, prompt.json_format.get("schema", {"type": "object"}))


REPAIR_WORDS = ("That answer is not valid: %s. Give the whole answer once more, corrected, and "
                "nothing else.")


def add_repair_turns(prompt: Prompt, reply: Reply, violation: str) -> None:
    """What the model said, and what is wrong with it."""
    words = REPAIR_WORDS % violation
    calls = [block for block in reply.of_kind(TOOL) if block.whole]
    text = "".join(block.text for block in reply.of_kind(TEXT))
    said: List[Part] = [Text(text)] if text else []
    said += [Call(block.call_id, block.name, read_arguments(block.text, "", [])) for block in calls]
    if prompt.turns[-1].role == "assistant":        # a prefill
        said = prompt.turns.pop().parts + said
    prompt.turns.append(Turn("assistant", said or [Text("(nothing)")]))
    if calls:
        prompt.turns.append(Turn("tool", [Result(block.call_id, words, is_error=True,
                                                 name=block.name) for block in calls]))
    else:
        prompt.turns.append(Turn("user", [Text(words)]))


def add_counts(one: Optional[int], other: Optional[int]) -> Optional[int]:
    return other if one is None else one if other is None else one + other


def add_usage(one: Optional[Usage], other: Optional[Usage]) -> Optional[Usage]:
    """The tokens of two calls together; a count that neither told stays untold."""
    if one is None or other is None:
        return one or other
    return Usage(*map(add_counts, one, other))  # type: ignore[arg-type]


# === ANSWER FILTERS (pure) ==================================================
# Functions from events to events, between the waist and the face.  Each says
# which kinds of block it may change; the fast lane stays shut for those.  A
# filter that must hold text back gives it out at the block's Close at latest,
# unless the answer failed in that block: what was not shown can be repeated.


NEVER_COPIED: FrozenSet[str] = frozenset([REFUSAL])     # too rare for a fast lane of their own


class Filter(NamedTuple):
    """A filter, and the kinds of block whose deltas it may change."""

    touches: FrozenSet[str]
    run: Callable[[Event], List[Event]]


def hide_thinking(event: Event) -> List[Event]:
    block = getattr(event, "block", None)
    return [] if block is not None and block.kind == THINKING else [event]


def restore_names(names: Mapping[str, ToolName],
                  types: FrozenSet[str] = frozenset()) -> Callable[[Event], List[Event]]:
    """Tools as the client knows them: name, namespace, and type where its API has that."""
    def run(event: Event) -> List[Event]:
        if isinstance(event, Open) and event.block.kind == TOOL:
            block = event.block
            own = names.get(block.name, ToolName(block.name))
            block.name, block.namespace = own.name, own.namespace
            block.type = own.type if own.type in types else FUNCTION
        return [event]
    return run


RAW_START = re.compile(r'\s*\{\s*"input"\s*:\s*"')
MAX_RAW_START = 1000        # characters in which `{"input": "` must have come
# A surrogate's first half and an escape that is cut, at the end: the rest of both may come.
UNFINISHED = r'(?:\\u[dD][89abAB][0-9a-fA-F]{2})?(?:\\(?:u[0-9a-fA-F]{0,3})?)?\Z'
RAW_TEXT = re.compile(r'((?:[^"\\]+|(?!%s)%s)*)(%s)?' % (UNFINISHED, KNOWN_ESCAPE, UNFINISHED))


class RawInput:
    """Takes free text out of the JSON text {"input": "..."} as its pieces come, up to the first
    that is no JSON: what follows is kept for the block's end."""

    def __init__(self) -> None:
        self.held = ""
        self.kept: Optional[List[str]] = None       # what is not looked at any more
        self.inside = False
        self.told: List[str] = []

    def feed(self, piece: str) -> str:
        """The free text that is complete so far."""
        if self.kept is not None:
            self.kept.append(piece)
            return ""
        self.held += piece
        if not self.inside:
            start = RAW_START.match(self.held)
            if not start:
                self.kept = [] if len(self.held) > MAX_RAW_START else None
                return ""
            self.inside, self.held = True, self.held[start.end():]
        text, unfinished = RAW_TEXT.match(self.held).groups()   # type: ignore[union-attr]
        if unfinished is None:
            self.kept = []
        self.held = self.held[len(text):]
        self.told.append(clean_text(json.loads('"%s"' % text, strict=False)) if text else "")
        return self.told[-1]

    def rest(self) -> str:
        """The free text in what was kept, in its best reading."""
        kept = (self.held + "".join(self.kept or [])).rstrip()
        kept = kept.removesuffix("}").rstrip().removesuffix('"')
        return clean_text(LOOSE_DECODER.decode('"%s"' % ESCAPE_OR_QUOTE.sub(escape_lone, kept)))

    def close(self, block: Block) -> str:
        """What of the free text was not told yet: arguments of another form than {"input": "..."}
        are told at the block's end, as its body is."""
        if not block.whole:
            return ""
        whole, told = call_text(block), "".join(self.told)
        return whole[len(told):] if whole.startswith(told) else self.rest()


def first_stop(text: str, fresh: int, stops: List[str]) -> Optional[Tuple[int, str]]:
    """(place, sequence) of the stop sequence that is complete first, the longest of those that end
    there; none is complete before the character `fresh`, so none is looked for there."""
    found = [(at, stop) for stop in stops
             for at in (text.find(stop, max(0, fresh + 1 - len(stop)) if fresh else 0),) if at >= 0]
    return min(found, key=lambda pair: (pair[0] + len(pair[1]), pair[0])) if found else None


def possible_start(text: str, stops: List[str], longest: int, firsts: FrozenSet[str]) -> int:
    """How many characters at the end of a text may be the beginning of one of the stop sequences,
    given sorted: a beginning's own place in their order is right before those that it begins."""
    for at in range(max(0, len(text) + 1 - longest), len(text)):
        if text[at] in firsts:
            rest = text[at:]
            place = bisect.bisect_left(stops, rest)
            if place < len(stops) and stops[place].startswith(rest):
                return len(rest)
    return 0


def cut_at_stops(stops: List[str]) -> Callable[[Event], List[Event]]:
    """End the answer in front of the first stop sequence in its text, also across deltas.  What is
    held back begins a sequence, so one place in it is tried again for each that is given up: the
    cost of a piece does not grow with what is held."""
    held, stops, longest = "", sorted(stops), max(map(len, stops))
    firsts = frozenset(stop[0] for stop in stops)

    def run(event: Event) -> List[Event]:
        nonlocal held
        block = getattr(event, "block", None)
        if block is None or block.kind != TEXT or isinstance(event, Open):
            return [event]
        if isinstance(event, Close):
            rest, held = ("", held) if block.broken else (held, "")
            return ([Delta(block, rest)] if rest else []) + [event]
        text = held + event.text        # type: ignore[union-attr]
        found = first_stop(text, len(held), stops)
        if found:
            (at, stop), held = found, ""
            cut: List[Event] = [Delta(block, text[:at])] if at else []
            return cut + [Close(block), End(STOP, stop)]
        size = possible_start(text, stops, longest, firsts)
        held = text[len(text) - size:]
        return [Delta(block, text[:len(text) - size])] if size < len(text) else []
    return run


FENCE_START = re.compile(r"\s*```[A-Za-z0-9_-]*[ \t]*\r?\n")
FENCE_MAYBE = re.compile(r"\s*(?:(`{0,2})|(```)[A-Za-z0-9_-]*([ \t]?)[ \t]*(\r?))")
MAX_FENCE_CHARS = MIB       # a longer beginning, as of endless white space, is that of no fence
FENCE_END = re.compile(r"\s*(```\s*)?")          # what may turn out to be the closing fence
FENCE_TAIL = re.compile(r"[\s`]*\Z")


def closing_size(text: str) -> int:
    """How many characters at the end of a fenced text may belong to its closing fence."""
    tail = FENCE_TAIL.search(text, max(0, len(text) - 64))
    found = tail[0] if tail else ""
    return len(found) if re.fullmatch(r"\s*`{0,3}\s*", found) else 0


class Fence:
    """Takes a code fence off the text of a JSON answer: models add one whatever they are told."""

    def __init__(self) -> None:
        self.state = "start"
        self.held = ""
        self.begun: List[str] = []      # the text as long as it may begin with a fence,
        self.size = 0                   # and its characters

    def feed(self, text: str) -> str:
        """What can be let go of.  Of what `begun` holds, `held` is the little that the decision
        needs, so that a piece costs no more than its own length."""
        whole = self.held + text
        if self.state == "start":
            self.begun.append(text)
            self.size += len(text)
            opening, maybe = FENCE_START.match(whole), FENCE_MAYBE.fullmatch(whole)
            if maybe and self.size <= MAX_FENCE_CHARS:
                self.held = "".join(maybe.groups(""))
                return ""
            self.state = "fenced" if opening else "plain"
            whole = whole[opening.end():] if opening else "".join(self.begun)
        ready = len(whole) - (closing_size(whole) if self.state == "fenced" else 0)
        self.held = whole[ready:]
        return whole[:ready]

    def close(self, block: Block) -> str:
        """What was held back, unless it is the closing fence."""
        if self.state == "start":
            return "".join(self.begun)
        return "" if self.state == "fenced" and FENCE_END.fullmatch(self.held) else self.held


def read_blocks(wanted: Callable[[Block], bool], make_reader: Callable[[], Union[RawInput, Fence]]
                ) -> Callable[[Event], List[Event]]:
    """Show what a reader makes of the text of such blocks; each block has a reader of its own."""
    reader = make_reader()

    def run(event: Event) -> List[Event]:
        nonlocal reader
        block = getattr(event, "block", None)
        if block is None or block.broken or not wanted(block):
            return [event]
        if isinstance(event, Open):
            reader = make_reader()
            return [event]
        text = reader.feed(event.text) if isinstance(event, Delta) else reader.close(block)
        grown: List[Event] = [Delta(block, text)] if text else []
        return grown + [event] if isinstance(event, Close) else grown
    return run


def strip_fence() -> Callable[[Event], List[Event]]:
    return read_blocks(lambda block: block.kind == TEXT, Fence)


def choose_filters(prompt: Prompt, types: FrozenSet[str] = frozenset()) -> List[Filter]:
    """The filters that this prompt's answer passes through, in order."""
    filters = []
    if not prompt.show_thinking:
        filters.append(Filter(frozenset([THINKING]), hide_thinking))
    if prompt.names:
        filters.append(Filter(frozenset(), restore_names(prompt.names, types)))
    if CUSTOM in types and any(own.type == CUSTOM for own in prompt.names.values()):
        filters.append(Filter(frozenset(), read_blocks(lambda block: block.raw, RawInput)))
    if prompt.json_format is not None:
        filters.append(Filter(frozenset([TEXT]), strip_fence()))
    if prompt.stops:
        filters.append(Filter(frozenset([TEXT]), cut_at_stops(prompt.stops)))
    return filters


# === PART: UPSTREAM FORMATS (pure) ==========================================
# === UPSTREAM ERRORS (pure) =================================================
# What an upstream says when it fails, in a status with a body or inside its
# stream, made a ProxyError: its own message, code and trace id are kept, keys
# in them are not.  The vendor wraps errors in several ways, often one inside
# another, and all its APIs share them.


def read_retry_after(fields: Fields) -> Optional[float]:
    """Seconds of a Retry-After header (RFC 9110 10.2.3); a date is held against the answer's own
    Date; nonsense counts as absent."""
    value = fields.get("retry-after", "")
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", value):
        return min(float(value), MAX_RETRY_AFTER_SECONDS)
    if "," not in value or "date" not in fields:
        return None
    from email.utils import parsedate_to_datetime   # rarely wanted, so not at start
    try:
        span = parsedate_to_datetime(value) - parsedate_to_datetime(fields["date"])
    except (ValueError, TypeError):
        return None
    return min(max(span.total_seconds(), 0.0), MAX_RETRY_AFTER_SECONDS)


ERROR_NAMES = ("code", "type", "name")      # the members that name an error
# The status of an error that names none, inside a stream: by a name as general as a status is,
# which decides nothing beside one.  After the documents of Anthropic (errors), OpenAI (error codes,
# ResponseError), Amazon Bedrock (InvokeModel) and the vendor.
NAME_STATUSES = {name: status for status, names in {
    400: ("invalid_request_error", "invalid_prompt", "bad_request", "validationexception"),
    401: ("authentication_error", "invalid_api_key", "unauthorized"),
    403: ("permission_error", "usage_exceeded", "forbidden"), 404: ("not_found_error", "not_found"),
    413: ("request_too_large",), 422: ("cmd_zdr_no_providers",),
    429: ("rate_limit_error", "rate_limit_exceeded", "rate_limited", "throttlingexception"),
    500: ("api_error", "server_error"), 504: ("timeout_error",), 529: ("overloaded_error",),
    503: ("service_unavailable", "slow_down", "serviceunavailableexception"),
}.items() for name in names}
# Never tried again, whatever an upstream says of it.
FINAL_STATUSES, FINAL_KINDS = (401, 402, 403), ("billing", "plan", "model", "usage_window")


def told_status(said: Json, before: Optional[int] = None) -> Optional[int]:
    """The status that an error object tells: its own, that which stood before it, or its name's."""
    numbers = (said.get("statusCode", said.get("status")), before, said.get("code"))
    found = [one for one in numbers if type(one) is int and 400 <= one <= 599]     # True is none
    names = [str(said.get(name)).lower() for name in ERROR_NAMES]
    found += [NAME_STATUSES[name] for name in names if name in NAME_STATUSES]
    return found[0] if found else None


def error_code(said: Json) -> str:
    """The name of an error that tells most."""
    names = [str(said[name]) for name in ERROR_NAMES if said.get(name)]
    return next((name for name in names if name.lower() in CODE_KINDS), (names or [""])[0])


def upstream_error(status: Optional[int], said: Json, trace_id: Optional[str],
                   retry_after: Optional[float]) -> ProxyError:
    """An upstream's error object, from a body or an event, as what the client is told.  `said` may
    hold message, code, type, name and isRetryable; `status` None: it was not told."""
    code, message = error_code(said), said.get("message")
    message = redact(str(message))[:MAX_ERROR_TEXT] if message else ""
    kind = classify_failure(status, code, message)
    if kind == "too_long" and "prompt is too long" not in message.lower():
        message = "prompt is too long: " + message      # the words that make clients compact
    known: Json = {"code": printable(code, 100) or None, "trace_id": trace_id,
                   "retry_after": retry_after}
    retryable = said.get("isRetryable")
    if retryable is False or (retryable is True and status not in FINAL_STATUSES
                              and kind not in FINAL_KINDS):
        known["retryable"] = retryable
    return ProxyError(kind, message or "The upstream answered %s without saying why." % (
        status or "with an error"), **known)


def decode_error(said: Any) -> Tuple[Optional[int], Json]:
    """(status, None where none is told; error object) of what an `error` member held: an object, a
    string, or a string such as `403 {"error": {...}}` with an envelope in it."""
    if isinstance(said, dict):
        inner, status = said.get("message"), None
        if isinstance(inner, str) and re.match(r"[1-5][0-9][0-9] *\{", inner):
            status, found = decode_error(inner)
            said = {**said, **found}
        return told_status(said, status), said
    text = str(said)
    before = re.match(r"\s*([45][0-9][0-9])\b", text)
    try:
        envelope, _ = DECODER.raw_decode(text, text.index("{"))
        inner = envelope.get("error") or envelope
    except (ValueError, RecursionError, AttributeError):
        inner = None
    if not isinstance(inner, dict):
        inner = {"message": text}
    return told_status(inner, int(before[1]) if before else None), inner


def read_stream_error(reading: Reading, said: Any) -> Iterator[Event]:
    """An error inside a stream, as whatever its `error` member held."""
    status, found = decode_error(said)
    yield from fail_answer(reading, upstream_error(status, found, None, None))


def read_upstream_failure(status: int, fields: Fields, body: bytes) -> ProxyError:
    """An answer whose status is not 200 (UPSTREAM 7.1), whatever its body looks like."""
    trace_id = printable(fields.get("x-trace-id", ""), 64) or None
    retry_after = read_retry_after(fields)
    if status < 400:
        return ProxyError("upstream_final", "The upstream answered %d; redirects are not "
                          "followed (is apiBase right?)." % status, trace_id=trace_id)
    readable = fields.get("content-encoding", "").strip(" \t").lower() in CODINGS
    text = body.decode("utf-8", "replace").strip() if readable else ""
    said: Any = "" if text.startswith(("<", "{")) else redact(text)[:500]   # no page for people
    if text.startswith("{"):
        try:
            envelope = json.loads(text)
            said = envelope.get("error") or envelope
        except (ValueError, RecursionError):
            said = ""
    return upstream_error(status, decode_error(said)[1], trace_id, retry_after)


# === SHARED BY FORMATS (pure) ===============================================
# What several upstream formats need: for a body, tools, choices and system turns;
# for an answer, lines made objects, arguments made JSON, and the end, with calls
# of which nothing says for certain that they are complete (their JSON tells).
# No format sends stop sequences, for the answer's filters find them, and which
# one it was.  A format uses this section and no other format's.

REASON_WORDS = {"stop": STOP, "end_turn": STOP, "stop_sequence": STOP, "length": LENGTH,
                "max_tokens": LENGTH, "max_output_tokens": LENGTH, "tool-calls": TOOL_CALLS,
                "tool_calls": TOOL_CALLS, "tool_use": TOOL_CALLS, "content-filter": FILTERED,
                "content_filter": FILTERED, "refusal": FILTERED, "pause_turn": PAUSED}
FINISH_WORDS = {**REASON_WORDS, "function_call": TOOL_CALLS, "sensitive": FILTERED,
                "model_context_window_exceeded": LENGTH}
BROKEN_WORDS = ("error", "network_error", "insufficient_system_resource")
NO_ACCESS = re.compile(r"upgrade_required|doesn't include API access", re.I)
NO_ACCESS_ADVICE = (" (ccproxy: `upstream: provider`, or x-ccproxy-upstream, chose the documented "
                    "API. Use a key of a plan with API access, or choose `alpha`; there is no "
                    "falling back from one to the other.)")
NOT_JSON = ("ignored", "an upstream line that is not JSON")
Readers = Dict[str, Callable[[Reading, Json], Iterator[Event]]]
# One JSON string without control characters and without surrogate escapes: those may be halves
# that must be joined, so they go the ordinary way.  Unrolled, so that it runs in linear time.
LANE_STRING = (rb'[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u(?:[0-9abcefABCEF][0-9a-fA-F]{3}'
               rb'|[dD][0-7][0-9a-fA-F]{2}))[^"\\\x00-\x1f]*)*')


def with_cache_control(part: Json, cache: Optional[Json]) -> Json:
    return {**part, "cache_control": cache} if cache else part


def single_type(schema: Json) -> Json:
    """A schema whose list of types is written as a union, unless it has a union of its own."""
    kinds = schema.get("type")
    if not isinstance(kinds, list) or not kinds:
        return schema
    union: Json = {"anyOf": [{"type": kind} for kind in kinds]} if len(kinds) > 1 else {
        "type": kinds[0]}
    return {**union, **{word: value for word, value in schema.items() if word != "type"}}


def model_schema(tool: Tool, prompt: Prompt) -> Json:
    """A tool's schema as its model takes it: Gemini refuses lists of types."""
    if not prompt.model.startswith("google/"):
        return tool.schema
    schema: Json = change_schemas(tool.schema, single_type)
    if schema != tool.schema:
        add_note(prompt.notes, "schema", "of tool %s: lists of types written as anyOf" % tool.name)
    return schema


def choice_object(choice: Choice) -> Json:
    return {"type": "tool", "name": choice.name} if choice.kind == "tool" else {"type": choice.kind}


def fold_system_turns(turns: List[Turn]) -> List[Turn]:
    """Turns for an API without the role `system`: reminders begin the user turn that follows, or
    are one of their own."""
    if "system" not in [turn.role for turn in turns]:
        return turns            # nearly always
    folded: List[Turn] = []
    for turn in reversed(turns):
        if turn.role == "system":
            behind = folded.pop().parts if folded and folded[-1].role == "user" else []
            turn = Turn("user", [part._replace(text=REMINDER % part.text) for part in turn.parts
                                 if isinstance(part, Text)] + behind)
        folded.append(turn)
    return folded[::-1]


def fit_sampling(prompt: Prompt, refused: Tuple[str, ...]) -> Json:
    """temperature and top_p without those that the model refuses, and a note for each of these."""
    given: Json = {"temperature": prompt.temperature, "top_p": prompt.top_p}
    for name in refused:
        if given[name] is not None:
            add_note(prompt.notes, "ignored", "%s, which %s refuses" % (name, prompt.model))
            given[name] = None
    return given


def body_bytes(body: Json) -> bytes:
    """A body as it is sent, without what is not set.  Raises ProxyError `invalid` for numbers that
    JSON has no words for."""
    try:
        return to_json({name: value for name, value in body.items() if value not in (None, [])})
    except ValueError:
        raise ProxyError("invalid", "A number in the request is out of range.") from None


def read_provider_failure(status: int, fields: Fields, body: bytes) -> ProxyError:
    """An answer whose status is not 200, in OpenAI's or in Anthropic's shape (UPSTREAM 7.3)."""
    error = read_upstream_failure(status, fields, body)
    if status == 403 and NO_ACCESS.search("%s %s" % (error.code, error.message)):
        return ProxyError("plan", error.message + NO_ACCESS_ADVICE, code="upgrade_required",
                          trace_id=error.trace_id)
    return error


def decode_object(data: bytes) -> Optional[Json]:
    try:
        raw: Json = DECODER.decode(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return raw          # an object, for the data begins with a brace


def read_objects(reading: Reading, line: bytes) -> Iterable[Json]:
    """The JSON objects that a line completes: nearly always its own, behind `data:` or not.  Data
    that is not whole waits for the event's other data lines, up to its blank line (WHATWG HTML
    9.2.6)."""
    is_data = line.startswith(b"data:")
    data = (line[5:] if is_data else line).strip(b" \t\r\n")
    if reading.event:
        if is_data:
            reading.event += b"\n" + data
        if len(reading.event) > MAX_LINE_BYTES:
            raise upstream_fault("an event longer than %d bytes" % MAX_LINE_BYTES)
        return () if line.strip(b"\r\n") else settle_event(reading)
    if not data.startswith(b"{"):       # an event's name, a comment, a blank line
        return ()
    raw = decode_object(data)
    if raw is not None:
        return (raw,)
    if is_data:
        reading.event = bytearray(data)
    else:
        add_note(reading.notes, *NOT_JSON)
    return ()


def settle_event(reading: Reading) -> Iterator[Json]:
    """The object of an event in several data lines.  Where they are none together, each is read
    alone: some services leave the blank line out, and one bad line must not hide the others."""
    lines, reading.event = bytes(reading.event), b""
    found = [decode_object(lines)] if lines else []
    if found == [None]:
        found = [decode_object(line) for line in lines.split(b"\n") if line.startswith(b"{")]
    for raw in found:
        if raw is not None:
            yield raw
        else:
            add_note(reading.notes, *NOT_JSON)


def read_typed_events(reading: Reading, readers: Readers, late_readers: Readers,
                      found: Iterable[Json]) -> Iterator[Event]:
    for raw in found:
        if not reading.began:
            reading.began = True
            yield Begin()
        kind = raw.get("type")
        if not isinstance(kind, str):
            kind = "error" if raw.get("error") else ""      # an envelope sent with status 200
        reader = (late_readers if reading.over else readers).get(kind)
        if reader is not None:
            yield from reader(reading, raw)


def read_typed_line(silent_line: "re.Pattern[bytes]", readers: Readers, late_readers: Readers,
                    reading: Reading, line: bytes) -> Iterable[Event]:
    """The events of one line; what is not a JSON object with a known type has none.  After the
    answer's end `late_readers` alone count."""
    if silent_line.match(line):
        found: Iterable[Json] = () if reading.began else ({},)
    else:
        found = read_objects(reading, line)
    return read_typed_events(reading, readers, late_readers, found) if found else ()


def objects_in(given: Any) -> List[Json]:
    return [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []


def read_counts(holder: Any) -> Dict[str, int]:
    """The members of an object that are counts; True is none."""
    if not isinstance(holder, dict):
        return {}
    return {name: value for name, value in holder.items() if type(value) is int and value >= 0}


def tool_name(given: Any) -> str:
    return given if isinstance(given, str) and given else "unknown"


def call_id_of(reading: Reading, given: Any, again: bool = False) -> str:
    """The id given to a call, or one that no other call of the answer has; a taken one only where
    it may come `again`."""
    given = given if isinstance(given, str) else ""
    taken = () if given and again else {block.call_id for block in reading.calls.values()}
    if given and given not in taken:
        return str(given)
    number = len(taken)
    while "call_%d" % number in taken:
        number += 1
    return "call_%d" % number


def read_no_json(text: str) -> Any:
    """The best reading of arguments that are not JSON: loose JSON, or the free text in them."""
    decoded, reader = decode_anyhow(text), RawInput()
    if decoded == text:
        told = reader.feed(text)
        return {"input": told + reader.rest()} if reader.inside else text
    return decoded


def call_arguments(raw: Json) -> str:
    """A call's arguments as JSON text of an object, healed as the vendor's client heals them."""
    given = next((raw[name] for name in ("input", "args", "arguments") if name in raw), None)
    if isinstance(given, str):
        try:
            decoded = DECODER.decode(given) if given.strip() else {}
            if isinstance(decoded, dict) and given.strip() and finite_value(decoded) == decoded:
                return given
        except (ValueError, RecursionError):
            decoded = read_no_json(given)
        given = decoded
    if isinstance(given, list) and len(given) == 1:
        given = given[0]
    if given is None:
        given = {}
    if not isinstance(given, dict):
        given = {"input": given}
    try:
        return ENCODER.encode(given)
    except ValueError:          # a number beyond all floats
        return ENCODER.encode(finite_value(given))


def whole_arguments(text: str) -> Optional[str]:
    """A call's arguments where they are complete JSON, also loose, healed to an object; None where
    not: what was cut closes no bracket."""
    try:
        decode_loosely(text)
    except (ValueError, RecursionError):
        return None
    return call_arguments({"input": text})


def settle_call(reading: Reading, block: Block, nothing: Optional[str]) -> Iterator[Event]:
    """Finish a call whose arguments are complete JSON; `nothing` is what none at all amount to."""
    if block.whole:
        return
    text = block.text
    arguments = whole_arguments(text) if text.strip() else nothing
    if arguments is not None:
        if not block.begun:
            block.pieces = []           # told by its start, and not shown yet
        yield from finish_call(reading, block.mark, block.name, arguments)


def ended_badly(how: str) -> ProxyError:
    return ProxyError("upstream", "The upstream ended its answer %s." % how)


def settle_answer(reading: Reading) -> Iterator[Event]:
    """The end, for the reason that was told before it; one that nobody knows is an ordinary one."""
    if reading.reason in BROKEN_WORDS:
        yield from fail_answer(reading, ended_badly("with an error"))
        return
    word = FINISH_WORDS.get(reading.reason, STOP)
    # A call without any arguments takes none, unless the answer was cut.  What stays open is half
    # a call, which nobody must run.
    for block in list(reading.calls.values()):
        yield from settle_call(reading, block, None if word == LENGTH else "{}")
    yield from end_answer(reading, word)


def settle_live(reading: Reading) -> Iterator[Event]:
    """Finish the open call, before another block begins, where its arguments are a whole object:
    nothing can follow that.  Looked at once, for then the other block waits."""
    live = reading.live
    if live is None or live.kind != TOOL or live.whole or reading.waiting:
        return
    text = live.text.strip()
    if text.endswith("}") and text.startswith("{") and whole_arguments(text) == text:
        yield from settle_call(reading, live, None)


def read_words(reading: Reading, kind: str, text: Any) -> Iterator[Event]:
    """Some more text, or some more thinking unless a repeated call's is left out."""
    if isinstance(text, str) and text and not (kind == THINKING and reading.mute_thinking):
        yield from settle_live(reading)
        yield from extend(reading, kind, text)


# === UPSTREAM FORMAT: ALPHA (pure) ==========================================
# Command Code's own wire format, POST /alpha/generate: a Prompt becomes one
# envelope; the answer is bare NDJSON, one event a line, whatever its content
# type says (server-sent events are read too).  ALPHA_READERS is the table of
# events; what is not in it is ignored, as the vendor's own client does.  There
# is no terminator: `finish` is the answer's end, `provider-metadata` follows it,
# and a stream that stops without `finish` was cut.

# Fixed and neutral, so that nothing of this host leaks and every request of a conversation
# begins with the same bytes.  The date is fixed too: it takes no part in the prompt as long as
# `system` is sent, and one that moves would break the cache at midnight.
ENVIRONMENT: Json = {"workingDir": "/workspace", "date": "2026-01-01", "environment": "linux",
                     "structure": [], "isGitRepo": False, "currentBranch": "", "mainBranch": "",
                     "gitStatus": "", "recentCommits": []}
NO_SYSTEM = " "             # without any, the server adds 7500 tokens of its own (UPSTREAM 1.4)


def alpha_part(part: Part) -> Json:
    """One part of a message (UPSTREAM 4.2)."""
    if isinstance(part, Text):
        return with_cache_control({"type": "text", "text": part.text}, part.cache)
    if isinstance(part, Image):
        return with_cache_control({"type": "image", "image": part.url, "mimeType": part.mime},
                                  part.cache)
    if isinstance(part, Thinking):
        return {"type": "reasoning", "text": part.text}
    if isinstance(part, Call):
        return with_cache_control({"type": "tool-call", "toolCallId": part.id,
                                   "toolName": part.name, "input": part.arguments}, part.cache)
    return with_cache_control({"type": "tool-result", "toolCallId": part.id,
                               "toolName": part.name or "unknown",
                               "output": {"type": "text", "value": result_text(part)}}, part.cache)


def alpha_system(texts: List[Text]) -> Any:
    """System blocks; all but the last end with a newline, as the vendor's client sends them."""
    if not texts:
        return NO_SYSTEM
    blocks = [text.text if text.text.endswith("\n") else text.text + "\n" for text in texts[:-1]]
    blocks.append(texts[-1].text)
    return [with_cache_control({"type": "text", "text": text}, given.cache)
            for text, given in zip(blocks, texts)]


def alpha_messages(turns: List[Turn]) -> List[Json]:
    """All messages, an assistant's parts in order; thinking whose text was withheld is left out."""
    messages = []
    for turn in fold_system_turns(turns):
        parts = order_parts(turn.parts) if turn.role == "assistant" else turn.parts
        content = [alpha_part(part) for part in parts
                   if not isinstance(part, Thinking) or part.text]
        if content:
            messages.append({"role": turn.role, "content": content})
    return messages


def build_alpha(prompt: Prompt, session: str) -> bytes:
    """Body of POST /alpha/generate (UPSTREAM 4.1), in the vendor's member order.  Raises ProxyError
    `invalid` for numbers that JSON has no words for."""
    params: Json = {
        "model": prompt.model, "messages": alpha_messages(prompt.turns),
        "tools": [with_cache_control({
            "name": tool.name, "description": tool.description,
            "input_schema": model_schema(tool, prompt)}, tool.cache) for tool in prompt.tools],
        "system": alpha_system(prompt.system), "max_tokens": prompt.max_tokens, "stream": True}
    optional = {"reasoning_effort": prompt.effort, "temperature": prompt.temperature,
                "top_p": prompt.top_p,
                "tool_choice": choice_object(prompt.choice) if prompt.choice else None}
    params.update((name, value) for name, value in optional.items() if value is not None)
    try:
        return to_json({"config": ENVIRONMENT, "memory": None, "taste": None, "skills": None,
                        "permissionMode": "standard", "threadId": session, "params": params})
    except ValueError:
        raise ProxyError("invalid", "A number in the request is out of range.") from None


def alpha_fields(config: Config, cli_version: str, session: str) -> List[Tuple[str, str]]:
    """The headers of the vendor's CLI that matter, and nothing that names this machine."""
    return [("x-command-code-version", cli_version), ("x-cli-environment", "production"),
            ("x-project-slug", config.project_slug), ("x-taste-learning", "false"),
            ("x-session-id", session)]


def read_delta_text(reading: Reading, raw: Json) -> Iterator[Event]:
    text = raw.get("text")
    return extend(reading, TEXT, text) if isinstance(text, str) and text else iter(())


def find_signature(raw: Json) -> str:
    """The provider's signature of some thinking, from whichever provider's metadata."""
    metadata = raw.get("providerMetadata")
    for provider in metadata.values() if isinstance(metadata, dict) else ():
        signature = provider.get("signature") if isinstance(provider, dict) else None
        if isinstance(signature, str) and signature:
            return signature
    return ""


def read_reasoning(reading: Reading, raw: Json) -> Iterator[Event]:
    """Thinking, and the signature that may come with its last, empty delta."""
    if reading.mute_thinking:       # another's was shown, which its signature does not sign
        return
    text = raw.get("text")
    if isinstance(text, str) and text:
        yield from extend(reading, THINKING, text)
    signature = find_signature(raw)
    block = reading.waiting[-1] if reading.waiting else reading.live
    if signature and block is not None and block.kind == THINKING:
        block.signature = signature


def read_input_start(reading: Reading, raw: Json) -> Iterator[Event]:
    name = call_id_of(reading, raw.get("id"), again=True)
    if raw.get("providerExecuted"):
        reading.ignored.add(name)
    elif name not in reading.ignored:
        start_call(reading, name, tool_name(raw.get("toolName")))
    return iter(())


def read_input_delta(reading: Reading, raw: Json) -> Iterator[Event]:
    piece, name = raw.get("delta"), raw.get("id")
    wanted = isinstance(piece, str) and piece and isinstance(name, str)
    return extend_call(reading, name, piece) if wanted else iter(())


def read_tool_call(reading: Reading, raw: Json) -> Iterator[Event]:
    """A whole call; those that the upstream runs itself are not the client's."""
    name = call_id_of(reading, raw.get("toolCallId"), again=True)
    if not raw.get("providerExecuted") and name not in reading.ignored:
        yield from finish_call(reading, name, tool_name(raw.get("toolName")), call_arguments(raw))


def alpha_usage(given: Any) -> Optional[Usage]:
    """Token counts (UPSTREAM 5.3): nested details first, the older flat members where absent."""
    counts = read_counts(given)
    if "inputTokens" not in counts and "outputTokens" not in counts:
        return None
    inputs = read_counts(given.get("inputTokenDetails"))
    return Usage(counts.get("inputTokens", 0), counts.get("outputTokens", 0),
                 inputs.get("cacheReadTokens", counts.get("cachedInputTokens")),
                 inputs.get("cacheWriteTokens"), read_counts(given.get("outputTokenDetails")).get(
                     "reasoningTokens", counts.get("reasoningTokens")))


def read_finish_step(reading: Reading, raw: Json) -> Iterator[Event]:
    reading.usage = alpha_usage(raw.get("usage")) or reading.usage
    return iter(())


def read_finish(reading: Reading, raw: Json) -> Iterator[Event]:
    """The answer's end (UPSTREAM 5.4); a reason nobody knows is an ordinary end."""
    reading.usage = alpha_usage(raw.get("totalUsage")) or reading.usage
    words = [raw.get("finishReason"), raw.get("rawFinishReason")]
    if "pause_turn" in words:
        yield from end_answer(reading, PAUSED)
    elif words[0] == "error":
        yield from fail_answer(reading, ended_badly("with an error"))
    else:
        known = [REASON_WORDS[word] for word in words
                 if isinstance(word, str) and word in REASON_WORDS]
        yield from end_answer(reading, known[0] if known else STOP)


def read_error(reading: Reading, raw: Json) -> Iterator[Event]:
    yield from read_stream_error(reading, raw.get("error") or {
        name: value for name, value in raw.items() if name != "type"})


def read_provider_metadata(reading: Reading, raw: Json) -> Iterator[Event]:
    """What the answer cost, which comes after its end."""
    cost = object_in(object_in(raw, "providerMetadata"), "gateway").get("cost")
    if isinstance(cost, str) and re.fullmatch(r"[0-9.eE+-]{1,32}", cost):
        reading.cost = cost
    return iter(())


LATE_READERS: Readers = {"provider-metadata": read_provider_metadata}   # after the answer's end
ALPHA_READERS: Readers = {
    "text-delta": read_delta_text, "reasoning-delta": read_reasoning,
    "reasoning-end": read_reasoning, "tool-input-start": read_input_start,
    "tool-input-delta": read_input_delta, "tool-call": read_tool_call,
    "finish-step": read_finish_step, "finish": read_finish, "error": read_error,
    "abort": lambda reading, raw: fail_answer(reading, ProxyError(
        "upstream", "The upstream aborted its answer.")), **LATE_READERS}

START_STEP = b'{"type":"start-step"'        # echoes the whole request: never parsed
SILENT_LINE = re.compile(       # events that tell nothing: not worth decoding
    rb'(?:data: ?)?\{"type":"(?:start|start-step|text-start|text-end|reasoning-start'
    rb'|tool-input-end)"')


def alpha_lane(kind: bytes, member: bytes) -> bytes:
    """A whole delta line and nothing else: (id, escaped string that is not empty)."""
    return (rb'(?:data: ?)?\{"type":"' + kind + rb'","id":"([^"\\\x00-\x1f]*)","'
            + member + rb'":"(?!")(' + LANE_STRING + rb')"\}(?:\r?\n)+')


ALPHA = UpstreamFormat(
    "alpha", "/alpha/generate", build_alpha,
    partial(read_typed_line, SILENT_LINE, ALPHA_READERS, LATE_READERS), read_upstream_failure,
    {TEXT: alpha_lane(b"text-delta", b"text"), THINKING: alpha_lane(b"reasoning-delta", b"text"),
     TOOL: alpha_lane(b"tool-input-delta", b"delta")}, alpha_fields, skip=START_STEP)


# === UPSTREAM FORMAT: OPENAI (pure) =========================================
# OpenAI's Chat Completions as an upstream: a Prompt becomes its body, the
# chunks of its SSE become events.  Written for any service that speaks it: what
# some of them add or leave out is taken as it comes.  A chunk's finish_reason
# tells how the answer ends, `data: [DONE]` that it has, or the body's end behind
# reason and usage: any other stream was cut.

REASONING_GPT = re.compile(r"(?:.*/)?(?:gpt-(?:[5-9]|[1-9][0-9])|o[1-9])(?![0-9a-z])", re.I)


def joined_text(parts: Iterable[Any], kind: Any) -> str:
    return "\n\n".join(part.text for part in parts if isinstance(part, kind) and part.text)


def openai_user(turn: Turn) -> Json:
    """A user's or system message: plain text as a string, which every service takes."""
    if len(turn.parts) == 1 and isinstance(turn.parts[0], Text):
        return {"role": turn.role, "content": turn.parts[0].text}
    content: List[Json] = []
    for part in turn.parts:
        if isinstance(part, Image):
            content.append({"type": "image_url", "image_url": {"url": part.url}})
        elif isinstance(part, Text):
            content.append({"type": "text", "text": part.text})
    return {"role": "user", "content": content}


def openai_assistant(turn: Turn) -> Json:
    """An assistant's message; its thinking goes back to models that think between calls and refuse
    a history without it (UPSTREAM 4.2)."""
    calls = [{"id": part.id, "type": "function", "function": {
        "name": part.name, "arguments": ENCODER.encode(part.arguments)}}
        for part in turn.parts if isinstance(part, Call)]
    words, thinking = joined_text(turn.parts, Text), joined_text(turn.parts, Thinking)
    message: Json = {"role": "assistant", "content": words or (None if calls else "")}
    if thinking:
        message["reasoning_content"] = thinking
    if calls:
        message["tool_calls"] = calls
    return message


def openai_messages(prompt: Prompt) -> List[Json]:
    """All messages; cache_control has no place here, for these services cache by themselves."""
    messages: List[Json] = []
    if prompt.system:
        messages.append({"role": "system", "content": joined_text(prompt.system, Text)})
    for turn in prompt.turns:
        if turn.role == "tool":
            messages += [{"role": "tool", "tool_call_id": part.id, "content": result_text(part)}
                         for part in turn.parts if isinstance(part, Result)]
            continue
        message = (openai_assistant if turn.role == "assistant" else openai_user)(turn)
        if len(message) > 2 or message["content"]:      # else thinking alone, its text withheld
            messages.append(message)
    return messages


def openai_choice(choice: Optional[Choice]) -> Any:
    if choice is None:
        return None
    if choice.kind == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.kind == "any" else choice.kind


def build_openai(prompt: Prompt, session: str) -> bytes:
    """Body of POST .../chat/completions (OpenAI's API reference).  OpenAI's reasoning models refuse
    max_tokens (it is max_completion_tokens there) and sampling; the other services know max_tokens
    alone.  Raises ProxyError `invalid`."""
    refused: Tuple[str, ...] = ()
    limit = "max_tokens"
    if REASONING_GPT.match(prompt.model):
        limit, refused = "max_completion_tokens", ("temperature", "top_p")
    try:
        messages = openai_messages(prompt)
    except ValueError:
        raise ProxyError("invalid", "A number in the request is out of range.") from None
    return body_bytes({
        "model": prompt.model, "messages": messages,
        "tools": [{"type": "function", "function": {
            "name": tool.name, "description": tool.description,
            "parameters": model_schema(tool, prompt)}} for tool in prompt.tools],
        "tool_choice": openai_choice(prompt.choice),
        "parallel_tool_calls": False if prompt.tools and not prompt.parallel else None,
        limit: prompt.max_tokens,
        "reasoning_effort": prompt.effort, **fit_sampling(prompt, refused),
        "stream": True, "stream_options": {"include_usage": True}})


def call_mark(reading: Reading, call: Json, named: bool) -> str:
    """How a call is known: by its index; services that send none, or the same for all, tell calls
    apart by their ids (an id that changes without a name is none of those)."""
    index, given = call.get("index"), call.get("id")
    mark = str(index) if isinstance(index, int) else ""
    block = reading.calls.get(mark)
    if isinstance(given, str) and given and (named and block.call_id != given if block
                                             else not mark):
        return given
    return mark or next(reversed(list(reading.calls)), "0")


def read_call_delta(reading: Reading, call: Json) -> Iterator[Event]:
    """A piece of a call: id and name with the first, its arguments' text bit by bit."""
    said = object_in(call, "function")
    name, piece = said.get("name"), said.get("arguments")
    mark = call_mark(reading, call, bool(name))
    if mark not in reading.calls:
        start_call(reading, call_id_of(reading, call.get("id")), tool_name(name), mark)
    block = reading.calls[mark]
    if name and isinstance(name, str) and not block.begun:
        block.name = name
    if isinstance(piece, dict):
        piece = call_arguments({"input": piece})
    if isinstance(piece, str) and piece:
        if not block.begun:
            yield from settle_live(reading)
        yield from extend_call(reading, mark, piece)


def openai_usage(given: Any) -> Optional[Usage]:
    """Token counts; prompt_tokens include cached ones, which DeepSeek tells by another name."""
    counts = read_counts(given)
    if "prompt_tokens" not in counts and "completion_tokens" not in counts:
        return None
    inputs = read_counts(given.get("prompt_tokens_details"))
    return Usage(counts.get("prompt_tokens", 0), counts.get("completion_tokens", 0),
                 inputs.get("cached_tokens", counts.get("prompt_cache_hit_tokens")),
                 inputs.get("cache_write_tokens"),
                 read_counts(given.get("completion_tokens_details")).get("reasoning_tokens"))


def read_answer_choice(reading: Reading, choice: Json) -> Iterator[Event]:
    """One chunk's part of the answer; thinking goes by either of two names.  A service that does
    not stream sends it whole, as `message`."""
    streamed = "delta" in choice or reading.live is not None
    delta = object_in(choice, "delta" if streamed else "message")
    thinking = delta.get("reasoning_content") or delta.get("reasoning")
    yield from read_words(reading, THINKING, thinking)
    yield from read_words(reading, TEXT, delta.get("content"))
    yield from read_words(reading, REFUSAL, delta.get("refusal"))
    for call in objects_in(delta.get("tool_calls")):
        yield from read_call_delta(reading, call)
    reason = choice.get("finish_reason")
    if isinstance(reason, str) and reason:
        reading.reason = reason
    reading.usage = openai_usage(choice.get("usage")) or reading.usage


def read_chunk(reading: Reading, raw: Json) -> Iterator[Event]:
    """One chunk: usage, and what there is of the one answer that was asked for."""
    reading.usage = openai_usage(raw.get("usage")) or reading.usage
    for choice in objects_in(raw.get("choices")):
        if choice.get("index") in (0, None):
            yield from read_answer_choice(reading, choice)


def read_openai_done(reading: Reading) -> Iterator[Event]:
    """The end of the stream; without a finish_reason before it, something went wrong there."""
    if reading.reason:
        yield from settle_answer(reading)
    else:
        yield from fail_answer(reading, ended_badly("without a reason"))


def read_openai_line(reading: Reading, line: bytes) -> Iterator[Event]:
    """The events of one line of the stream."""
    if reading.over:
        return
    done = line.startswith(b"data:") and line[5:].strip() == b"[DONE]"
    for raw in settle_event(reading) if done else read_objects(reading, line):
        if not reading.over:
            if not reading.began:
                reading.began = True
                yield Begin()
            yield from (read_stream_error(reading, raw["error"]) if raw.get("error")
                        else read_chunk(reading, raw))
    if done and not reading.over:
        yield from read_openai_done(reading)


def read_openai_end(reading: Reading) -> Iterator[Event]:
    """The end of the body: that of the answer too, where all but [DONE] was told."""
    if reading.reason and reading.usage is not None and not reading.over:
        yield from settle_answer(reading)


# A chunk that is one delta and nothing else, whatever scalars of no consequence stand around it.
# Names are spelled out, so that no error, usage or second delta can hide among them.
LANE_PLAIN = rb'"[^"\\\x00-\x1f]*"'
LANE_HEAD = (rb'data: ?\{(?:"(?:id|object|created|model|system_fingerprint|service_tier|provider)":'
             rb'(?:' + LANE_PLAIN + rb'|[0-9]+|null),)*"choices":\[\{')
LANE_ASIDE = (rb'"(?:index":0|(?:logprobs|finish_reason|native_finish_reason|stop_reason'
              rb'|token_ids)":null)')
LANE_TAIL = (rb'\}(?:,' + LANE_ASIDE + rb')*\}\](?:,"(?:usage|system_fingerprint|service_tier|'
             rb'obfuscation)":(?:' + LANE_PLAIN + rb'|null))*\}(?:\r?\n)+')


def openai_lane(before: bytes, member: bytes, others: bytes, behind: bytes = b"") -> bytes:
    """A line with one delta: (its call's index or nothing, escaped string that is not empty)."""
    other = rb'"(?:' + others + rb')":(?:null|"")'
    delta = (rb'(?:"role":"assistant",)?(?:' + other + rb',)*' + before + member + rb':"(?!")('
             + LANE_STRING + rb')"' + behind + rb'(?:,' + other + rb')*')
    return LANE_HEAD + rb'(?:' + LANE_ASIDE + rb',)*"delta":\{' + delta + LANE_TAIL


OPENAI_LANES = {
    TEXT: openai_lane(b"()", rb'"content"', rb'reasoning(?:_content)?|refusal|tool_calls'),
    THINKING: openai_lane(b"()", rb'"reasoning(?:_content)?"', rb'content|refusal|tool_calls'),
    TOOL: openai_lane(rb'"tool_calls":\[\{"index":([0-9]+)(?:,"id":(?:null|""))?'
                      rb'(?:,"type":(?:"function"|null))?,"function":\{(?:"name":(?:null|""),)?',
                      rb'"arguments"', rb'content|reasoning(?:_content)?|refusal', rb'\}\}\]')}
OPENAI = UpstreamFormat("openai", "/provider/v1/chat/completions", build_openai, read_openai_line,
                        read_provider_failure, OPENAI_LANES, read_end=read_openai_end)


# === UPSTREAM FORMAT: ANTHROPIC (pure) ======================================
# Anthropic's Messages as an upstream: a Prompt becomes its body, its SSE becomes
# events.  `type` in the data tells what a line is, so the `event:` lines above
# it say nothing new.  message_delta tells why the answer ends, message_stop that
# it has: a stream without that was cut.  Which way a Claude model thinks, and
# whether it takes a temperature, is told by its version alone; a name that is
# none of Claude's gets what the API had first.

CLAUDE_NAME = re.compile(r"(?:.*/)?claude-(?:[a-z]+-)?([0-9]{1,2})(?:[-.]([0-9]{1,2}))?(?![0-9])")
ADAPTIVE_SINCE = (4, 6)     # thinks as it sees fit, steered by effort; before that, by a budget
NO_BUDGET_SINCE = (4, 7)    # a budget, a temperature or top_p is a 400; thinking text is withheld
ONE_SAMPLER_SINCE = (4, 1)  # temperature and top_p together are a 400
EFFORT_BUDGETS = {"low": 2_000, "medium": 5_000, "high": 10_000, "xhigh": 20_000, "max": 32_000}
MIN_BUDGET = 1024           # of thinking tokens; it must also leave room within max_tokens
PLAIN_CALL_ID = re.compile(r"[A-Za-z0-9_-]+")
SILENT_EVENT = re.compile(rb'data: ?\{"type": ?"ping"')


def claude_version(model: str) -> Tuple[int, int]:
    """(major, minor) of a Claude model's name, (0, 0) of any other."""
    found = CLAUDE_NAME.match(model.lower())
    return (int(found[1]), int(found[2] or 0)) if found else (0, 0)


def plain_call_id(call_id: str) -> str:
    """A call's id in the letters that this API takes; other providers' have dots and colons."""
    if PLAIN_CALL_ID.fullmatch(call_id):
        return call_id
    digest = hashlib.sha256(call_id.encode("utf-8", "replace")).hexdigest()[:8]
    return "%s_%s" % (re.sub(r"[^A-Za-z0-9_-]", "_", call_id)[:48], digest)


def anthropic_result(part: Result) -> Json:
    block: Json = {"type": "tool_result", "tool_use_id": plain_call_id(part.id)}
    if part.text.strip():
        block["content"] = part.text
    return {**block, "is_error": True} if part.is_error else block


def anthropic_block(part: Part) -> Optional[Json]:
    """One content block; None for what the API refuses: blank text, thinking nobody signed."""
    if isinstance(part, Thinking):
        return {"type": "thinking", "thinking": part.text,
                "signature": part.signature} if part.signature else None
    if isinstance(part, Text):
        block: Json = {"type": "text", "text": part.text}
        if not part.text.strip():
            return None
    elif isinstance(part, Image):
        block = {"type": "image", "source": {"type": "base64", "media_type": part.mime,
                                             "data": part.url.partition(",")[2]}}
    elif isinstance(part, Call):
        block = {"type": "tool_use", "id": plain_call_id(part.id), "name": part.name,
                 "input": part.arguments}
    else:
        block = anthropic_result(part)
    return with_cache_control(block, part.cache)


def is_signed(turn: Turn) -> bool:
    return any(isinstance(part, Thinking) and part.signature for part in turn.parts)


def anthropic_blocks(turn: Turn, notes: List[str]) -> List[Json]:
    """A turn's content.  With signed thinking it keeps its own order, for that must come back as it
    was; what nobody signed cannot, nor what led to nothing: the API refuses thinking at the end."""
    unsigned = any(isinstance(part, Thinking) and not part.signature for part in turn.parts)
    if unsigned:
        add_note(notes, "dropped", "earlier thinking without its provider's signature")
    ordered = turn.role == "assistant" and not is_signed(turn)
    parts = order_parts(turn.parts) if ordered else turn.parts
    blocks = [block for block in map(anthropic_block, parts) if block]
    while blocks and blocks[-1]["type"] == "thinking":
        add_note(notes, "dropped", "earlier thinking that nothing came of")
        blocks.pop()
    return blocks


def anthropic_messages(prompt: Prompt) -> List[Json]:
    """All messages, neighbours of one role made one, as the API itself would; the first must be the
    user's.  Raises ProxyError `invalid` when all of them are blank."""
    messages: List[Json] = []
    for turn in fold_system_turns(prompt.turns):
        role = "assistant" if turn.role == "assistant" else "user"
        blocks = anthropic_blocks(turn, prompt.notes)
        if blocks and messages and messages[-1]["role"] == role:
            messages[-1]["content"] += blocks
        elif blocks:
            messages.append({"role": role, "content": blocks})
    if not messages:
        raise wrong(prompt.source, "must hold at least one message that is not blank")
    if messages[0]["role"] != "user":
        add_note(prompt.notes, "repaired", "a conversation that the assistant begins")
        messages.insert(0, {"role": "user", "content": [{"type": "text", "text": "(begin)"}]})
    return messages


def anthropic_tool(tool: Tool) -> Json:
    said = {"description": tool.description} if tool.description else {}
    return with_cache_control({"name": tool.name, **said, "input_schema": tool.schema}, tool.cache)


def anthropic_choice(prompt: Prompt) -> Optional[Json]:
    """tool_choice, which also says that an answer may hold one call at most."""
    chosen = choice_object(prompt.choice) if prompt.choice else None
    if prompt.parallel or not prompt.tools:
        return chosen
    return {**(chosen or {"type": "auto"}), "disable_parallel_tool_use": True}


def can_go_on_thinking(prompt: Prompt) -> bool:
    """Whether a budget may be given: amid tool calls only where their turn began with thinking."""
    turns = [turn for turn in prompt.turns if turn.role == "assistant"][-1:]
    return all(is_signed(turn) for turn in turns
               if any(isinstance(part, Call) for part in turn.parts))


def budget_thinking(prompt: Prompt) -> Json:
    """Thinking within a budget, for models before ADAPTIVE_SINCE and for other services'."""
    budget = prompt.budget or EFFORT_BUDGETS.get(prompt.effort or "medium", MIN_BUDGET)
    budget = min(max(budget, MIN_BUDGET), (prompt.max_tokens or 0) - 1)
    if budget < MIN_BUDGET or not can_go_on_thinking(prompt):
        add_note(prompt.notes, "ignored", "thinking, which does not fit into this request")
        return {}
    return {"thinking": {"type": "enabled", "budget_tokens": budget}}


def anthropic_thinking(prompt: Prompt) -> Json:
    """How the model is told to think: not at all unless it was asked for, nor beside a forced call,
    which excludes it."""
    version = claude_version(prompt.model)
    asked = prompt.budget is not None or prompt.effort is not None
    asked = asked and (prompt.choice is None or prompt.choice.kind == "auto")
    if version < ADAPTIVE_SINCE:
        return budget_thinking(prompt) if asked else {}
    members: Json = {"output_config": {"effort": prompt.effort}} if prompt.effort else {}
    if asked:
        members["thinking"] = {"type": "adaptive"}
        if prompt.show_thinking and version >= NO_BUDGET_SINCE:
            members["thinking"]["display"] = "summarized"
    return members


def refused_sampling(prompt: Prompt, thinks: bool) -> Tuple[str, ...]:
    """What of temperature and top_p the model would answer with a 400."""
    version = claude_version(prompt.model)
    if thinks or version >= NO_BUDGET_SINCE:
        return ("temperature", "top_p")
    both = version >= ONE_SAMPLER_SINCE and prompt.temperature is not None
    return ("top_p",) if both else ()


def build_anthropic(prompt: Prompt, session: str) -> bytes:
    """Body of POST .../messages (Anthropic's API reference).  Raises ProxyError `invalid`."""
    thinking = anthropic_thinking(prompt)
    sampling = fit_sampling(prompt, refused_sampling(prompt, "thinking" in thinking))
    if (sampling["temperature"] or 0) > 1:
        add_note(prompt.notes, "clamped", "temperature %g -> 1" % sampling["temperature"])
        sampling["temperature"] = 1
    return body_bytes({
        "model": prompt.model, "max_tokens": prompt.max_tokens,
        "system": [block for block in map(anthropic_block, prompt.system) if block],
        "messages": anthropic_messages(prompt),
        "tools": [anthropic_tool(tool) for tool in prompt.tools],
        "tool_choice": anthropic_choice(prompt), **thinking, **sampling, "stream": True})


def greater(one: Optional[int], other: Optional[int]) -> Optional[int]:
    return max((count for count in (one, other) if count is not None), default=None)


def anthropic_usage(given: Any, before: Optional[Usage]) -> Optional[Usage]:
    """Token counts so far, with all input in one figure.  They are cumulative, and each event tells
    only some of them: the greatest that was told counts."""
    counts = read_counts(given)
    told = [counts.get(name) for name in (
        "cache_read_input_tokens", "cache_creation_input_tokens", "input_tokens", "output_tokens")]
    if told == [None] * 4:
        return before
    old = before or Usage(0, 0)
    fresh = old.input - (old.cache_read or 0) - (old.cache_write or 0)
    known = (old.cache_read, old.cache_write, fresh, old.output)
    read, write, fresh, output = map(greater, known, told)      # type: ignore[assignment]
    return Usage(fresh + (read or 0) + (write or 0), output, read, write)


def read_message_start(reading: Reading, raw: Json) -> Iterator[Event]:
    reading.usage = anthropic_usage(object_in(raw, "message").get("usage"), reading.usage)
    return iter(())


def block_mark(raw: Json) -> str:
    index = raw.get("index")
    return str(index) if isinstance(index, int) else "0"


def read_block_start(reading: Reading, raw: Json) -> Iterator[Event]:
    """A block begins: a call tells id and name, the others may hold their first text.  What the
    service runs itself is not the client's."""
    block, mark = object_in(raw, "content_block"), block_mark(raw)
    kind = block.get("type")
    if kind == "tool_use":
        given, call_id = block.get("input"), call_id_of(reading, block.get("id"))
        start_call(reading, call_id, tool_name(block.get("name")), mark)
        if isinstance(given, dict) and given:       # counts where no deltas follow
            reading.calls[mark].pieces = [call_arguments({"input": given})]
    elif kind in ("text", "thinking"):
        yield from read_words(reading, kind, block.get(kind))
        yield from sign_thinking(reading, block.get("signature"))
    else:
        add_note(reading.notes, "ignored", "a block of type %s in the answer"
                 % printable(str(kind), 60))


def read_block_delta(reading: Reading, raw: Json) -> Iterator[Event]:
    """A block grows; text and thinking come one block after another, calls go by their index."""
    delta, mark = object_in(raw, "delta"), block_mark(raw)
    kind, piece = delta.get("type"), delta.get("partial_json")
    if kind == "text_delta":
        yield from read_words(reading, TEXT, delta.get("text"))
    elif kind == "thinking_delta":
        yield from read_words(reading, THINKING, delta.get("thinking"))
    elif kind == "signature_delta":
        yield from sign_thinking(reading, delta.get("signature"))
    elif isinstance(piece, str) and piece and mark in reading.calls:
        if not reading.calls[mark].begun:
            reading.calls[mark].pieces = []
        yield from extend_call(reading, mark, piece)


def read_block_stop(reading: Reading, raw: Json) -> Iterator[Event]:
    """A block ends: thinking is closed, so that the next gets a signature of its own.  A call that
    max_tokens cut is stopped too, so its JSON decides, at its first stop."""
    mark = block_mark(raw)
    block = reading.calls.get(mark)
    if block is not None:
        if mark not in reading.ignored:
            reading.ignored.add(mark)
            yield from settle_call(reading, block, None)
    elif reading.live is not None and reading.live.kind != TOOL:
        yield from close_live(reading)


def read_message_delta(reading: Reading, raw: Json) -> Iterator[Event]:
    """How the answer ends; a refusal may say why (Anthropic's guide to streaming refusals)."""
    delta = object_in(raw, "delta")
    yield from read_words(reading, REFUSAL, object_in(delta, "stop_details").get("explanation"))
    reason = delta.get("stop_reason")
    if isinstance(reason, str):
        reading.reason = reason
    reading.usage = anthropic_usage(raw.get("usage"), reading.usage)


ANTHROPIC_READERS: Readers = {
    "message_start": read_message_start, "content_block_start": read_block_start,
    "content_block_delta": read_block_delta, "content_block_stop": read_block_stop,
    "message_delta": read_message_delta,
    "message_stop": lambda reading, raw: settle_answer(reading),
    "error": lambda reading, raw: read_stream_error(
        reading, raw.get("error") or {"message": "an unnamed error"})}


def anthropic_lane(kind: bytes, member: bytes) -> bytes:
    """A frame with one delta, or its data line alone: (index, escaped string that is not empty).
    Anthropic pads some lines with blanks before the last brace."""
    return (rb'(?:event: ?content_block_delta\r?\n)?data: ?\{"type":"content_block_delta"'
            rb',"index":([0-9]+),"delta":\{"type":"' + kind + rb'","' + member
            + rb'":"(?!")(' + LANE_STRING + rb')" *\} *\}(?:\r?\n)+')


ANTHROPIC = UpstreamFormat(
    "anthropic", "/provider/v1/messages", build_anthropic,
    partial(read_typed_line, SILENT_EVENT, ANTHROPIC_READERS, {}), read_provider_failure,
    {TEXT: anthropic_lane(b"text_delta", b"text"),
     THINKING: anthropic_lane(b"thinking_delta", b"thinking"),
     TOOL: anthropic_lane(b"input_json_delta", b"partial_json")},
    lambda config, cli_version, session: (("anthropic-version", "2023-06-01"),))


# === UPSTREAMS (pure) =======================================================
# Which upstream serves a request: one row for each word of the option
# `upstream` and of x-ccproxy-upstream.  `provider` is two formats: the list of
# models tells which endpoints a model has, else its name does.  A further service
# that speaks either API would be one more row.

UPSTREAM_FORMATS = {known.name: known for known in (ALPHA, OPENAI, ANTHROPIC)}


def provider_format(model: str, endpoints: Iterable[str]) -> UpstreamFormat:
    """The documented endpoint of a model: Messages for Claude, Chat Completions for the others."""
    ends = {path.rstrip("/").rpartition("/")[2] for path in endpoints} & {"messages", "completions"}
    messages = "messages" in ends if len(ends) == 1 else (
        model.lower().rpartition("/")[2].startswith("claude"))
    return UPSTREAM_FORMATS["anthropic" if messages else "openai"]


UPSTREAMS: Dict[str, Callable[[str, Iterable[str]], UpstreamFormat]] = {
    "alpha": lambda model, endpoints: ALPHA, "provider": provider_format}


def parse_upstream(given: str, default: str) -> str:
    """The word of x-ccproxy-upstream, else the option's.  Raises ProxyError 400."""
    word = given.strip().lower() or default
    if word not in UPSTREAMS:
        raise ProxyError("invalid", "x-ccproxy-upstream must be one of: %s." % ", ".join(UPSTREAMS))
    return word


# === PART: APIS (pure) ======================================================
# === FACE: CHAT (pure) ======================================================
# OpenAI's Chat Completions: request to Prompt, events to `chat.completion.chunk`
# frames, a finished reply to one `chat.completion`.  Thinking travels as
# `reasoning_content`, which is what clients of open models read (R33).

CHAT_REASONS = {STOP: "stop", LENGTH: "length", TOOL_CALLS: "tool_calls",
                FILTERED: "content_filter", PAUSED: "stop"}
CHAT_MEMBERS = {TEXT: "content", THINKING: "reasoning_content", REFUSAL: "refusal"}


CHAT_FIELDS = {**OPENAI_FIELDS, **honoured("messages system function_call n"), "store": (False,)}


def chat_choice(body: Json, notes: List[str]) -> Optional[Choice]:
    """`tool_choice`, or the older `function_call`."""
    legacy = body.get("function_call")
    if body.get("tool_choice") is not None or legacy is None:
        return read_choice_of_tool(body.get("tool_choice"), notes)
    if isinstance(legacy, dict):
        legacy = {"type": "function", **legacy}
    return read_choice_of_tool(legacy, notes, "function_call")


def parse_chat(body: Json, notes: List[str]) -> Prompt:
    """A Chat Completions request as a Prompt.  Raises ProxyError `invalid` naming the field."""
    count = read_positive(body, ("n",))
    if count is not None and count > 1:
        raise wrong("n", "must be 1: there is one answer to a request")
    note_ignored(body, CHAT_FIELDS, notes)
    options = get(body, "stream_options", "an object") or {}
    prompt = Prompt(
        asked=read_model_name(body), turns=[], notes=notes,
        system=read_system(body.get("system"), "system", notes), tools=read_any_tools(body, notes),
        choice=chat_choice(body, notes), parallel=read_any_parallel(body),
        max_tokens=read_any_limit(body, notes),
        temperature=read_finite(body, "temperature"), top_p=read_finite(body, "top_p"),
        effort=read_any_effort(body), budget=read_any_budget(body), stops=read_any_stops(body),
        json_format=read_any_format(body),
        stream=bool(get(body, "stream", "a boolean")),
        show_thinking="reasoning" not in body or not openrouter_reasoning(body).get("exclude"),
        include_usage=bool(get(options, "include_usage", "a boolean", "stream_options")))
    read_messages(body, prompt)
    return prompt


def chat_error(error: ProxyError) -> Json:
    """An error in OpenAI's shape (their API reference, error object)."""
    row = KINDS[error.kind]
    return {"error": {"message": error.message, "type": row.openai, "param": error.param,
                      "code": row.code, **error_extras(error)}}


def chat_chunk(reply: Reply, delta: Json, reason: Optional[str] = None) -> bytes:
    return data_frame({"id": reply.id, "object": "chat.completion.chunk",
                       "created": reply.created, "model": reply.model,
                       "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})


def chat_call(block: Block, text: str) -> Json:
    """A tool call with so much of its arguments (of its input, where that is free text)."""
    kind, member = ("custom", "input") if block.raw else ("function", "arguments")
    return {"id": block.call_id, "type": kind, kind: {"name": block.name, member: text}}


def chat_open(reply: Reply, event: Any) -> bytes:
    """A tool call's first frame tells id and name; text needs none."""
    block = event.block
    if block.kind != TOOL:
        return b""
    return chat_chunk(reply, {"tool_calls": [{"index": block.number, **chat_call(block, "")}]})


def chat_delta(reply: Reply, event: Any) -> bytes:
    block = event.block
    if block.kind == TOOL:
        said = {"custom": {"input": event.text}} if block.raw else \
            {"function": {"arguments": event.text}}
        return chat_chunk(reply, {"tool_calls": [{"index": block.number, **said}]})
    return chat_chunk(reply, {CHAT_MEMBERS[block.kind]: event.text})


def chat_usage(usage: Usage) -> Json:
    """Token counts as OpenAI writes them: prompt_tokens include cached ones."""
    shown: Json = {"prompt_tokens": usage.input, "completion_tokens": usage.output,
                   "total_tokens": usage.input + usage.output}
    if usage.cache_read is not None:
        shown["prompt_tokens_details"] = {"cached_tokens": usage.cache_read}
    if usage.reasoning is not None:
        shown["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning}
    return shown


def chat_end(reply: Reply, event: Any) -> bytes:
    """The one last choice, the usage where it was asked for and is known, and [DONE]."""
    frames = chat_chunk(reply, {}, CHAT_REASONS[reply.reason])
    if reply.include_usage and reply.usage:
        frames += data_frame({"id": reply.id, "object": "chat.completion.chunk",
                              "created": reply.created, "model": reply.model, "choices": [],
                              "usage": chat_usage(reply.usage)})
    return frames + b"data: [DONE]\n\n"


CHAT_FRAMES: Dict[Any, Callable[[Reply, Any], bytes]] = {
    Begin: lambda reply, event: chat_chunk(reply, {"role": "assistant", "content": ""}),
    Open: chat_open, Delta: chat_delta, Close: lambda reply, event: b"", End: chat_end,
    Fail: lambda reply, event: data_frame(chat_error(event.error))}


def chat_frames(reply: Reply, event: Event) -> bytes:
    """The SSE frames that show one event to a chat client."""
    return CHAT_FRAMES[type(event)](reply, event)


def chat_body(reply: Reply) -> Json:
    """The whole answer as one chat completion; a call that was cut off is left out."""
    calls = [block for block in reply.of_kind(TOOL) if block.whole]
    said: Dict[str, List[str]] = {"content": []}
    for block in reply.blocks:
        text = block.text if block.kind != TOOL else ""
        if text:
            said.setdefault(CHAT_MEMBERS[block.kind], []).append(text)
    message: Json = {"role": "assistant", **{name: "".join(texts) for name, texts in said.items()}}
    if not said["content"] and (calls or "refusal" in said):
        message["content"] = None
    if calls:
        message["tool_calls"] = [chat_call(block, call_text(block)) for block in calls]
    body: Json = {"id": reply.id, "object": "chat.completion", "created": reply.created,
                  "model": reply.model,
                  "choices": [{"index": 0, "message": message, "logprobs": None,
                               "finish_reason": CHAT_REASONS[reply.reason]}]}
    if reply.usage:
        body["usage"] = chat_usage(reply.usage)
    return body


CHAT = Face("chat", parse_chat, chat_frames, chat_body, chat_error, "chatcmpl-", CHAT_FIELDS,
            types=frozenset([CUSTOM]))


# === FACE: MESSAGES (pure) ==================================================
# Anthropic's Messages: request to Prompt, events to named SSE frames, a
# finished reply to one message.  Thinking is shown only to a request that
# asked for it, and each thinking block ends with exactly one signature.

STOP_REASONS = {STOP: "end_turn", LENGTH: "max_tokens", TOOL_CALLS: "tool_use",
                FILTERED: "refusal", PAUSED: "pause_turn"}
DELTA_SHAPES = {TEXT: ("text_delta", "text"), THINKING: ("thinking_delta", "thinking"),
                REFUSAL: ("text_delta", "text"), TOOL: ("input_json_delta", "partial_json")}


MESSAGES_FIELDS = {
    **ANY_FIELDS, **honoured("messages system thread betas anthropic_version anthropic_beta "
                             "user_profile_id workspace_id"),
    "metadata": honoured("user_id"), "cache_control": honoured("type ttl"),
    "context_management": tuple({"edits": [{"type": "clear_thinking_20251015", "keep": keep}]}
                                for keep in ("all", {"type": "all"})),  # nothing is cleared here
    "speed": ("standard",), "compaction": (), "fallbacks": (), "fallback_credit_token": (),
    "diagnostics": ({"previous_message_id": None},),
    "billing_policy": ({"type": "billing_policy", "bill_to": "self"}, {"type": "billing_policy"})}


def refuse_threads(body: Json) -> None:
    """Message threads need a store: this answer makes the SDKs go on with full history (R17)."""
    if body.get("thread") is not None:
        raise ProxyError("invalid", "Message threads are not kept here: send the whole history.",
                         param="thread", details={"error_code": "thread_unsupported_request",
                                                  "unsupported": ["thread"]})


def cache_last_part(prompt: Prompt, cache: Optional[Json]) -> None:
    """A top-level cache_control means the last part that can carry one."""
    if cache and prompt.turns and prompt.turns[-1].parts:
        turn = prompt.turns[-1]
        prompt.turns[-1] = Turn(turn.role, with_cache(turn.parts, cache))


def parse_messages(body: Json, notes: List[str]) -> Prompt:
    """A Messages request as a Prompt.  Raises ProxyError `invalid` naming the field."""
    refuse_threads(body)
    note_ignored(body, MESSAGES_FIELDS, notes)
    get(body, "output_format", "an object")     # output_config.format under its first name
    shown = (read_thinking_kind(body) in ("enabled", "adaptive")
             and not openrouter_reasoning(body).get("exclude"))
    metadata = get(body, "metadata", "an object") or {}
    prompt = Prompt(
        asked=read_model_name(body), turns=[], notes=notes,
        system=read_system(body.get("system"), "system", notes),
        tools=read_any_tools(body, notes), parallel=read_any_parallel(body),
        choice=read_choice_of_tool(body.get("tool_choice"), notes),
        max_tokens=read_any_limit(body, notes),
        temperature=read_finite(body, "temperature"), top_p=read_finite(body, "top_p"),
        effort=read_any_effort(body), budget=read_any_budget(body), stops=read_any_stops(body),
        json_format=read_any_format(body), stream=bool(get(body, "stream", "a boolean")),
        show_thinking=shown, user_id=get(metadata, "user_id", "a string", "metadata"))
    read_messages(body, prompt)
    cache_last_part(prompt, read_cache(body, ""))
    return prompt


def messages_usage(reply: Reply) -> Json:
    """Token counts as Anthropic writes them: input_tokens without cached ones.  Both counts are
    mandatory there, so they are estimates where the upstream was cut off (a note says so)."""
    usage = reply.usage
    if usage is None:
        return {"input_tokens": reply.input_estimate, "output_tokens": reply.output_estimate}
    fresh = usage.input - (usage.cache_read or 0) - (usage.cache_write or 0)
    shown = {"input_tokens": max(0, fresh)}
    if usage.cache_write is not None:
        shown["cache_creation_input_tokens"] = usage.cache_write
    if usage.cache_read is not None:
        shown["cache_read_input_tokens"] = usage.cache_read
    return {**shown, "output_tokens": usage.output}


def messages_shell(reply: Reply) -> Json:
    return {"id": reply.id, "type": "message", "role": "assistant", "model": reply.model,
            "content": [], "stop_reason": None, "stop_sequence": None,
            "usage": {"input_tokens": reply.input_estimate, "output_tokens": 0}}


def messages_block(block: Block, whole: bool) -> Json:
    """A content block: empty as it opens, complete in a plain answer."""
    text = block.text if whole else ""
    if block.kind == TOOL:
        toolset = {"toolset_name": block.namespace} if block.namespace else {}
        return {"type": "tool_use", "id": block.call_id, "name": block.name, **toolset,
                "input": read_arguments(text, "", [])}
    if block.kind in (TEXT, REFUSAL):
        return {"type": "text", "text": text}
    return {"type": "thinking", "thinking": text,
            "signature": (block.signature or DEFAULT_SIGNATURE) if whole else ""}


def messages_frame(kind: str, **members: Any) -> bytes:
    return event_frame(kind, {"type": kind, **members})


def messages_begin(reply: Reply, event: Any) -> bytes:
    return messages_frame("message_start", message=messages_shell(reply))


def messages_open(reply: Reply, event: Any) -> bytes:
    return messages_frame("content_block_start", index=event.block.index,
                          content_block=messages_block(event.block, False))


def messages_delta(reply: Reply, event: Any) -> bytes:
    kind, member = DELTA_SHAPES[event.block.kind]
    return messages_frame("content_block_delta", index=event.block.index,
                          delta={"type": kind, member: event.text})


def messages_close(reply: Reply, event: Any) -> bytes:
    """The end of a block, behind the one signature that thinking needs (FIELD 13)."""
    block, frames = event.block, b""
    if block.kind == THINKING:
        frames = messages_frame("content_block_delta", index=block.index, delta={
            "type": "signature_delta", "signature": block.signature or DEFAULT_SIGNATURE})
    return frames + messages_frame("content_block_stop", index=block.index)


def messages_reason(reply: Reply) -> Json:
    refused = reply.reason == STOP and reply.of_kind(REFUSAL)
    reason = "stop_sequence" if reply.sequence is not None else \
        STOP_REASONS[FILTERED if refused else reply.reason]
    return {"stop_reason": reason, "stop_sequence": reply.sequence}


def messages_end(reply: Reply, event: Any) -> bytes:
    return (messages_frame("message_delta", delta=messages_reason(reply),
                           usage=messages_usage(reply))
            + messages_frame("message_stop"))


def messages_error(error: ProxyError) -> Json:
    """An error in Anthropic's shape (their API reference, errors)."""
    return {"type": "error", "error": {"type": KINDS[error.kind].anthropic,
                                       "message": error.message, **error_extras(error)}}


MESSAGES_FRAMES: Dict[Any, Callable[[Reply, Any], bytes]] = {
    Begin: messages_begin, Open: messages_open, Delta: messages_delta, Close: messages_close,
    End: messages_end,
    Fail: lambda reply, event: event_frame("error", messages_error(event.error))}


def messages_frames(reply: Reply, event: Event) -> bytes:
    """The named SSE frames that show one event to a messages client."""
    return MESSAGES_FRAMES[type(event)](reply, event)


def messages_body(reply: Reply) -> Json:
    """The whole answer as one message; a call that was cut off is left out."""
    content = [messages_block(block, True) for block in reply.blocks
               if block.kind != TOOL or block.whole]
    return {**messages_shell(reply), "content": content, **messages_reason(reply),
            "usage": messages_usage(reply)}


MESSAGES = Face("messages", parse_messages, messages_frames, messages_body, messages_error, "msg_",
                MESSAGES_FIELDS)


# === RESPONSES ITEMS (pure) =================================================
# The input items of OpenAI's Responses API (R42) as system texts and turns.
# Items of one turn come one by one; putting them together again is PROMPT
# REPAIR's work.  What can only be looked up in a store is refused (ITEM MEMORY
# has resolved what is known); what only the vendor's own tools produce leaves a
# note.

CARRIED = "ccproxy1."       # begins the encrypted_content of reasoning that carries its own text


def carry_thinking(text: str, signature: str = "") -> str:
    """Thinking as an encrypted_content: not secret, but it survives the next turn (no store).  The
    signature follows behind a dot, for Claude wants its thinking back as it was signed."""
    told = [text, signature] if signature else [text]
    return CARRIED + ".".join(base64.b64encode(one.encode("utf-8", "replace")).decode()
                              for one in told)


def carried_thinking(given: Any) -> Thinking:
    """What `carry_thinking` put into an encrypted_content; an empty one for another's."""
    if not isinstance(given, str) or not given.startswith(CARRIED):
        return Thinking("")
    text, _, signature = given[len(CARRIED):].partition(".")
    try:
        found = Thinking(*[base64.b64decode(one, validate=True).decode()
                           for one in (text, signature)])
    except ValueError:      # another dot is no base64 either
        return Thinking("")
    return found if len(found.signature) <= MAX_SIGNATURE_BYTES else Thinking("")


def read_reasoning_item(item: Json, path: str, prompt: Prompt) -> None:
    """Thinking of an earlier turn: carried in full, else what its content or summary tells."""
    thinking = carried_thinking(item.get("encrypted_content"))
    for name in ("content", "summary"):
        texts = [part["text"] for part in get(item, name, "a list", path) or []
                 if isinstance(part, dict) and isinstance(part.get("text"), str)]
        if not any(thinking):
            thinking = Thinking("\n\n".join(filter(None, texts)))
    if any(thinking):
        prompt.turns.append(Turn("assistant", [thinking]))
    else:
        add_note(prompt.notes, "dropped", "reasoning at %s" % path)


def read_call_item(item: Json, path: str, prompt: Prompt) -> None:
    """function_call, and custom_tool_call whose raw input becomes the one argument."""
    name = get(item, "name", "a string", path) or UNNAMED
    given = item.get("arguments")
    if item.get("type") == "custom_tool_call":
        given = {"input": get(item, "input", "a string", path) or ""}
    call = Call(get(item, "call_id", "a string", path) or "", name,
                read_arguments(given, path + ".arguments", prompt.notes),
                namespace=get(item, "namespace", "a string", path) or "")
    prompt.turns.append(Turn("assistant", [call]))


def text_list(given: Any) -> List[str]:
    """A list of strings, where a model may give one string alone."""
    given = given if isinstance(given, list) else [given]
    return [str(text) for text in given if text is not None]


def shell_action(given: Json) -> Json:
    return {"commands": text_list(given.get("commands", given.get("command"))),
            **{name: given.get(name) for name in ("timeout_ms", "max_output_length")}}


def exec_action(given: Json) -> Json:
    command = given.get("command")
    command = ["bash", "-lc", command] if isinstance(command, str) else text_list(command)
    rest = {name: given.get(name) for name in ("timeout_ms", "user", "working_directory")}
    return {"type": "exec", "command": command, "env": object_in(given, "env"), **rest}


def patch_operation(given: Json) -> Json:
    operation = {"type": given.get("type") or "update_file", "path": str(given.get("path") or "")}
    if operation["type"] == "delete_file":
        return operation
    return {**operation, "diff": str(given.get("diff") or "")}


class CallItem(NamedTuple):
    """How a client tool's call is written as an item: `make` gives what stands in `member`."""

    kind: str
    prefix: str                 # of its id
    member: str
    make: Callable[[Json], Any]
    more: Mapping[str, Any] = {}


CALL_ITEMS = {      # by the tool's type (OpenAI's API reference, items of a response)
    "shell": CallItem("shell_call", "sh", "action", shell_action),
    "local_shell": CallItem("local_shell_call", "lsh", "action", exec_action),
    "apply_patch": CallItem("apply_patch_call", "apc", "operation", patch_operation),
    "computer_use_preview": CallItem("computer_call", "cu", "action", dict,
                                     {"pending_safety_checks": []}),
    "computer": CallItem("computer_call", "cu", "actions", lambda given: given.get("actions", []),
                         {"pending_safety_checks": []}),
    "tool_search": CallItem("tool_search_call", "tsc", "arguments", dict,
                            {"execution": "client"})}


def read_hosted_item(item: Json, path: str, prompt: Prompt) -> None:
    parts = read_hosted(item, path, prompt.notes)
    if parts:
        prompt.turns.append(Turn("assistant", parts))


def read_client_call(item: Json, path: str, prompt: Prompt) -> None:
    """The call of a client tool: what its item holds is what the function's arguments were."""
    rows = [(name, row) for name, row in CALL_ITEMS.items()
            if row.kind == item["type"] and item.get(row.member) is not None]
    if not rows or item.get("execution", "client") != "client":
        read_hosted_item(item, path, prompt)
        return
    name, row = rows[0]
    given = item[row.member]
    given = {row.member: given} if isinstance(given, list) else given
    arguments = read_arguments(given, "%s.%s" % (path, row.member), prompt.notes)
    arguments = {key: value for key, value in arguments.items()
                 if value is not None and (key, value) != ("type", "exec")}
    call_id = get(item, "call_id", "a string", path) or ""
    prompt.turns.append(Turn("assistant", [Call(call_id, name, arguments)]))


def shell_text(chunk: Json) -> str:
    """What a command printed and how it ended, in words."""
    outcome = object_in(chunk, "outcome")
    ending = "(timed out)" if outcome.get("type") == "timeout" else (
        "(exit code %s)" % outcome["exit_code"] if "exit_code" in outcome else "")
    stderr = chunk.get("stderr")
    texts = (chunk.get("stdout"), stderr and "stderr: %s" % stderr, ending)
    return "\n".join(str(text) for text in texts if text)


def read_client_output(item: Json, path: str, prompt: Prompt) -> None:
    """The output of a client tool: of a shell for each command, of the others as it is."""
    output = item.get("output")
    if item["type"] == "shell_call_output" and isinstance(output, list):
        output = "\n".join(shell_text(chunk) for chunk in output if isinstance(chunk, dict))
    elif item["type"] == "apply_patch_call_output":
        output = output or item.get("status")
    read_output_item({**item, "output": output}, path, prompt)


def read_found_tools(item: Json, path: str, prompt: Prompt) -> None:
    """Tools that a client's search found, and those added in mid-conversation: they are offered."""
    found = read_tools(item.get("tools"), path + ".tools", prompt.notes)
    prompt.tools += found
    if item["type"] == "tool_search_output":
        names = ", ".join(tool.name for tool in found) or "nothing"
        read_output_item({**item, "output": "Found: " + names}, path, prompt)


def read_output_item(item: Json, path: str, prompt: Prompt) -> None:
    """The output of a tool: a string, a list of parts (Codex's view_image), or any object."""
    parts = read_result_parts(item.get("output"), path + ".output", prompt.notes)
    prompt.turns.append(Turn("user", [
        make_result(get(item, "call_id", "a string", path) or "", parts,
                    item.get("status") == "failed", None)]))


def refuse_reference(item: Json, path: str, prompt: Prompt) -> None:
    """A reference that the shell could not resolve: thinking can be missed, anything else not."""
    if str(item.get("id")).startswith("rs_"):
        add_note(prompt.notes, "dropped", "reasoning at %s, which is not known any more" % path)
        return
    raise wrong(path, "refers to an item that is not known here: send the item itself (in most "
                "SDKs: store false)")


ITEM_READERS: Dict[str, Callable[[Json, str, Prompt], None]] = {
    "message": read_message, "reasoning": read_reasoning_item,
    "function_call": read_call_item, "custom_tool_call": read_call_item,
    "function_call_output": read_output_item, "custom_tool_call_output": read_output_item,
    "tool_search_output": read_found_tools, "additional_tools": read_found_tools,
    **{row.kind: read_client_call for row in CALL_ITEMS.values()},
    **dict.fromkeys(HOSTED_ITEMS, read_hosted_item),
    **dict.fromkeys(("shell_call_output", "local_shell_call_output", "apply_patch_call_output",
                     "computer_call_output"), read_client_output),
    "item_reference": refuse_reference}


def read_input(body: Json, prompt: Prompt) -> None:
    """All of `input`, a string or a list of items.  Raises ProxyError `invalid` with the path."""
    given = body.get("input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise wrong("input", "must be a string or a list of at least one item")
    call_ids: Dict[str, Any] = {}       # a local shell's output may name its call's item
    for index, item in enumerate(given):
        path = "input[%d]" % index
        check(item, "an object", path)
        kind = get(item, "type", "a string", path) or "message"
        if kind == "local_shell_call":
            call_ids[str(item.get("id"))] = item.get("call_id")
        elif kind == "local_shell_call_output":
            item = {"call_id": call_ids.get(str(item.get("id"))) or item.get("id"), **item}
        reader = ITEM_READERS.get(kind)
        if reader is None:
            add_note(prompt.notes, "dropped", "%s at %s" % (printable(kind, 60), path))
        else:
            reader(item, path, prompt)
    lift_leading_system(prompt)


# === FACE: RESPONSES (pure) =================================================
# OpenAI's Responses, the only API that Codex speaks: request to Prompt, events
# to its numbered SSE events (R43), a finished reply to one response object.
# Each block is one output item; an item is told complete in output_item.done,
# for clients act on that.  Stateless: `store` is answered false.

STATEFUL = {"previous_response_id": None, "conversation": None, "background": False,
            "prompt": None}
RESPONSES_FIELDS = {
    **OPENAI_FIELDS, **honoured("input instructions include store"),
    **dict.fromkeys(STATEFUL, HONOURED),        # or refused
    "background_options": ({"completion_window": "soonest"},), "context_management": (),
    "access_programs": ({"cyber": "standard"},), "personality": (),
    "image": ({"context_compression": "auto"}, {"context_compression": "disabled"})}
TERMINAL = {LENGTH: ("incomplete", "max_output_tokens"), FILTERED: ("incomplete", "content_filter")}
# By a block's kind, a call's by its tool's type: its text's event, and the member that holds it.
TEXT_EVENTS = {TEXT: ("output_text", "text"), THINKING: ("reasoning_summary_text", "text"),
               REFUSAL: ("refusal", "refusal"), FUNCTION: ("function_call_arguments", "arguments"),
               CUSTOM: ("custom_tool_call_input", "input")}


def refuse_state(body: Json) -> None:
    """What needs a store is refused plainly rather than answered without its history."""
    for name, harmless in STATEFUL.items():
        if body.get(name) not in (None, harmless):
            raise wrong(name, "cannot be honoured: nothing is stored here, so send the whole "
                        "text and history in `instructions` and `input`")


def echo_request(body: Json) -> Json:
    """What a response object repeats of its request, without its bulk: tools, instructions."""
    reasoning = object_in(body, "reasoning")
    return {"max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata") or {},
            "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
            "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
            "temperature": body.get("temperature"), "top_p": body.get("top_p"),
            "text": {"format": object_in(body, "text").get("format") or {"type": "text"}},
            "tool_choice": body.get("tool_choice") or "auto"}


def parse_responses(body: Json, notes: List[str]) -> Prompt:
    """A Responses request as a Prompt.  Raises ProxyError `invalid` naming the field."""
    refuse_state(body)
    note_ignored(body, RESPONSES_FIELDS, notes)
    get(get(body, "text", "an object") or {}, "verbosity", "a string", "text")
    include = get(body, "include", "a list") or []
    prompt = Prompt(
        asked=read_model_name(body), turns=[], notes=notes, source="input",
        system=read_system(body.get("instructions"), "instructions", notes),
        tools=read_any_tools(body, notes), parallel=read_any_parallel(body),
        choice=read_choice_of_tool(body.get("tool_choice"), notes),
        max_tokens=read_any_limit(body, notes), stops=read_any_stops(body),
        temperature=read_finite(body, "temperature"), top_p=read_finite(body, "top_p"),
        effort=read_any_effort(body), budget=read_any_budget(body),
        json_format=read_any_format(body),
        stream=bool(get(body, "stream", "a boolean")),
        show_thinking=not openrouter_reasoning(body).get("exclude"),
        carry_thinking="reasoning.encrypted_content" in include, echo=echo_request(body),
        remember=body.get("store") is not False)
    for name in dict.fromkeys(map(str, include[:MAX_UNKNOWN])):
        if name != "reasoning.encrypted_content":
            add_note(notes, "ignored", "include %s" % name)
    read_input(body, prompt)
    return prompt


def responses_usage(usage: Usage) -> Json:
    return {"input_tokens": usage.input,
            "input_tokens_details": {"cached_tokens": usage.cache_read or 0},
            "output_tokens": usage.output,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning or 0},
            "total_tokens": usage.input + usage.output}


def item_id(reply: Reply, block: Block) -> str:
    prefix = {THINKING: "rs", TOOL: "ctc" if block.raw else "fc"}.get(block.kind, "msg")
    if block.type in CALL_ITEMS:
        prefix = CALL_ITEMS[block.type].prefix
    return "%s_%s%02d" % (prefix, reply.id.partition("_")[2], block.index)


def output_item(reply: Reply, block: Block, status: str) -> Json:
    """A block as an output item: empty while in_progress, whole when completed."""
    done = status == "completed"
    item: Json = {"id": item_id(reply, block), "type": "message", "status": status}
    parts = [item_part(block, block.text)] if done and block.kind != TOOL else []
    if block.kind in (TEXT, REFUSAL):
        return {**item, "role": "assistant", "content": parts}
    if block.kind == THINKING:
        item = {"id": item["id"], "type": "reasoning", "summary": parts}
        if reply.carry_thinking:
            item["encrypted_content"] = (
                carry_thinking(block.text, block.signature) if done else "")
        return item
    if block.type in CALL_ITEMS:
        row, given = CALL_ITEMS[block.type], read_arguments(block.text, "", []) if done else {}
        inner = given.get(row.member)       # a model may repeat the item's nesting
        made = row.make(inner if isinstance(inner, dict) else given)
        return {**item, "type": row.kind, row.member: made, **row.more, "call_id": block.call_id}
    item.update(type="custom_tool_call" if block.raw else "function_call",
                call_id=block.call_id, name=block.name)
    item["input" if block.raw else "arguments"] = call_text(block) if done else ""
    if block.namespace:
        item["namespace"] = block.namespace
    return item


def item_part(block: Block, text: str) -> Json:
    """The one part of a message, or of thinking's summary."""
    if block.kind == REFUSAL:
        return {"type": "refusal", "refusal": text}
    if block.kind == THINKING:
        return {"type": "summary_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def response_object(reply: Reply, status: str, **members: Any) -> Json:
    """The response as it stands; `output` holds the items that are complete."""
    return {"id": reply.id, "object": "response", "created_at": reply.created, "status": status,
            "background": False, "error": None, "incomplete_details": None, "instructions": None,
            "model": reply.model, "output": [], "previous_response_id": None, "store": False,
            "tools": [], "truncation": "disabled", "usage": None, **reply.echo, **members}


def numbered_frame(reply: Reply, kind: str, **members: Any) -> bytes:
    """One event; its number comes last, where the fast lane can put it in."""
    number = reply.frames_sent
    reply.frames_sent += 1
    return event_frame(kind, {"type": kind, **members, "sequence_number": number})


def responses_begin(reply: Reply, event: Any) -> bytes:
    shell = response_object(reply, "in_progress")
    return (numbered_frame(reply, "response.created", response=shell)
            + numbered_frame(reply, "response.in_progress", response=shell))


def text_frame(reply: Reply, block: Block, kind: str, **members: Any) -> bytes:
    """An event about the text of an item, or about the one part that holds it."""
    place = {THINKING: {"summary_index": 0}, TOOL: {}}.get(block.kind, {"content_index": 0})
    return numbered_frame(reply, "response." + kind, item_id=item_id(reply, block),
                          output_index=block.index, **place, **members)


def part_frame(reply: Reply, block: Block, step: str, text: str) -> bytes:
    """content_part.* or reasoning_summary_part.* of an item; a call has no parts."""
    if block.kind == TOOL:
        return b""
    part = "reasoning_summary_part." if block.kind == THINKING else "content_part."
    return text_frame(reply, block, part + step, part=item_part(block, text))


def responses_open(reply: Reply, event: Any) -> bytes:
    """An item begins, and its only part; a client tool's call is told at its end, for its items
    have no deltas of arguments."""
    block = event.block
    if block.type in CALL_ITEMS:
        return b""
    frames = numbered_frame(reply, "response.output_item.added", output_index=block.index,
                            item=output_item(reply, block, "in_progress"))
    return frames + part_frame(reply, block, "added", "")


def responses_delta(reply: Reply, event: Any) -> bytes:
    block = event.block
    if block.type in CALL_ITEMS:
        return b""
    kind, _ = TEXT_EVENTS[block.type if block.kind == TOOL else block.kind]
    return text_frame(reply, block, kind + ".delta", delta=event.text)


def responses_close(reply: Reply, event: Any) -> bytes:
    """An item is complete; of a call that was cut nothing more is told, so that nobody runs it."""
    block, frames = event.block, b""
    if block.type in CALL_ITEMS:
        frames = numbered_frame(reply, "response.output_item.added", output_index=block.index,
                                item=output_item(reply, block, "in_progress"))
    if block.kind == TOOL and not block.whole:
        return frames
    text = call_text(block)
    if block.type not in CALL_ITEMS:
        kind, member = TEXT_EVENTS[block.type if block.kind == TOOL else block.kind]
        frames = text_frame(reply, block, kind + ".done", **{member: text})
    return (frames + part_frame(reply, block, "done", text)
            + numbered_frame(reply, "response.output_item.done", output_index=block.index,
                             item=output_item(reply, block, "completed")))


def responses_body(reply: Reply) -> Json:
    """The whole answer as one response object; a call that was cut off is left out."""
    status, why = TERMINAL.get(reply.reason, ("completed", None))
    output = [output_item(reply, block, "completed") for block in reply.blocks
              if block.kind != TOOL or block.whole]
    return response_object(reply, status, output=output,
                           incomplete_details={"reason": why} if why else None,
                           usage=responses_usage(reply.usage) if reply.usage else None)


def responses_end(reply: Reply, event: Any) -> bytes:
    body = responses_body(reply)
    return numbered_frame(reply, "response." + body["status"], response=body)


def responses_fail(reply: Reply, event: Any) -> bytes:
    """The terminal event of an answer that broke, with a code of OpenAI's list."""
    error = event.error
    permanent = KINDS[error.kind].again == NEVER and error.status < 500 and not error.retryable
    code = {"rate_limit": "rate_limit_exceeded", "billing": "insufficient_quota",
            "too_long": "context_length_exceeded"}.get(
                error.kind, "invalid_prompt" if permanent else "server_error")
    return numbered_frame(reply, "response.failed", response=response_object(
        reply, "failed", error={"code": code, "message": error.message}))


RESPONSES_FRAMES: Dict[Any, Callable[[Reply, Any], bytes]] = {
    Begin: responses_begin, Open: responses_open, Delta: responses_delta,
    Close: responses_close, End: responses_end, Fail: responses_fail}


def responses_frames(reply: Reply, event: Event) -> bytes:
    """The SSE events that show one event of ours to a Responses client."""
    return RESPONSES_FRAMES[type(event)](reply, event)


RESPONSES = Face("responses", parse_responses, responses_frames, responses_body, chat_error,
                 "resp_", RESPONSES_FIELDS, keeps=True, numbered=True,
                 types=frozenset([CUSTOM, *CALL_ITEMS]))


# === PART: ANSWER (pure) ====================================================
# === FAST LANE (pure) =======================================================
# While a block is open that no filter touches, a line that is exactly a delta
# of that block is copied, its JSON string still escaped, between a prefix and a
# suffix taken from the face's own frame.  Any other line takes the ordinary
# way, and both give the same frames; ANSWER drives it.

LANE_MARK = "=lane-mark="       # stands for the text in a frame that is cut into prefix and suffix


class Lane(NamedTuple):
    """How deltas of the open block are copied; `call_id` b"" where ids do not matter."""

    pattern: Any
    block: Block
    call_id: bytes
    prefix: bytes
    suffix: bytes               # up to the frame's number, where frames are numbered
    end: bytes = b""            # behind that number


JSON_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{4}|.)")
BACKSLASH = ord("\\")


def escaped_length(strings: List[bytes]) -> int:
    """How many characters escaped JSON strings hold."""
    escaped = strings[0] if len(strings) == 1 else b"".join(strings)
    if BACKSLASH not in escaped:            # nearly always
        return len(escaped) if escaped.isascii() else len(escaped.decode())
    return len(JSON_ESCAPE.sub("x", escaped.decode()))


def is_copyable(data: bytes) -> bool:
    """Whether strings in these bytes may stand in a frame as they are: UTF-8, no LINE_BREAKS."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return False
    return "\u2028" not in text and "\u2029" not in text and "\x85" not in text


def cut_frame(face: Face, reply: Reply, block: Block) -> Tuple[bytes, bytes, bytes]:
    """What stands before and behind the text, and behind the number, in a delta's frame."""
    number = reply.frames_sent
    frame = face.frames(reply, Delta(block, LANE_MARK))
    reply.frames_sent = number
    prefix, _, suffix = frame.rpartition(LANE_MARK.encode())
    if not face.numbered:
        return prefix, suffix, b""
    start, _, end = suffix.rpartition(b"%d" % number)
    return prefix, start, end


# === ANSWER (pure) ==========================================================
# The one read loop: bytes of an upstream's body in, frames for the client out,
# in any pieces.  It does not know who drives it.  A streaming answer shows each
# event as it comes; a plain one collects blocks, shown once by `body()`.


class Answer:
    """Reads one answer, however often its upstream call is repeated, and shows it in one face.
    `feed` and `eof` give frames (b"" in a plain answer).  When `over`, either `error` is set and
    nothing was shown of it yet, or the answer is complete.  `visible` tells that text or a tool
    call was shown, after which nothing can be repeated."""

    __slots__ = ("face", "upstream", "reply", "stream", "allow_empty", "filters", "touched",
                 "asked", "lines", "reading", "lane", "counts", "begun", "over", "visible",
                 "shown", "error", "unclosed", "noted", "lines_read", "kept", "secrets",
                 "comment_end")

    def __init__(self, face: Face, upstream: UpstreamFormat, reply: Reply, prompt: Prompt,
                 allow_empty: bool) -> None:
        self.face, self.upstream, self.reply = face, upstream, reply
        self.stream, self.allow_empty = prompt.stream, allow_empty
        self.filters = choose_filters(prompt, face.types)
        self.touched = NEVER_COPIED.union(*(one.touches for one in self.filters)) \
            if self.filters else NEVER_COPIED
        # To make the filters anew, without what takes memory as long as the answer streams.
        self.asked = replace(prompt, turns=[], system=[], tools=[], echo={}) \
            if self.filters else None
        self.lines = LineBuffer(upstream.skip)
        self.reading = Reading(notes=reply.notes, one_call=not prompt.parallel)
        self.lane: Optional[Lane] = None
        self.counts = {TEXT: 0, THINKING: 0, REFUSAL: 0, TOOL: 0}
        self.begun = self.over = self.visible = self.shown = False
        self.error: Optional[ProxyError] = None
        self.unclosed: Optional[Block] = None       # the block in which the answer failed
        self.noted = 0              # late notes that went out as comments
        self.lines_read = 0         # feeds that held a whole line: signs of life
        self.kept = 0               # bytes of lines whose text is kept
        self.secrets: List[str] = []    # which no note may show
        self.comment_end = b"\n\n"  # of the client: see comment_end

    def feed(self, data: bytes) -> bytes:
        """Frames for some more bytes of the upstream's body."""
        lines = self.lines.feed(data)
        if not lines:
            return b""
        self.lines_read += 1
        if not self.stream or self.face.keeps:
            self.kept += len(lines)
            if self.kept > MAX_KEPT_BYTES:
                raise ProxyError("upstream_final", "The upstream's answer is longer than %d bytes."
                                 % MAX_KEPT_BYTES)
        clean = lines.isascii() or is_copyable(lines)
        frames: List[bytes] = []
        at, end = 0, len(lines)
        while at < end:
            if self.lane is not None and clean:
                at = self.copy_deltas(self.lane, lines, at, frames)
                if at >= end:
                    break
            stop = lines.index(b"\n", at)
            if stop > at or self.reading.event:
                self.read_line(lines[at:stop], frames)
            at = stop + 1
        return frames[0] if len(frames) == 1 else b"".join(frames)

    def eof(self) -> bytes:
        """Frames for the end of the upstream's body; without a `finish` that is a failure."""
        frames: List[bytes] = []
        for line in (self.lines.flush(), b""):      # an event ends with its blank line, or here
            self.read_line(line, frames)
        for event in self.upstream.read_end(self.reading):
            self.pass_on(event, frames)
        return b"".join(frames) + self.stop(ProxyError(
            "upstream", "The upstream's answer stopped before its end." if self.reading.began
            else "The upstream's answer was empty."))

    def stop(self, error: ProxyError) -> bytes:
        """Frames for a failure, as of the connection, if the answer was not over."""
        frames: List[bytes] = []
        for event in () if self.over else fail_answer(self.reading, error):
            self.pass_on(event, frames)
        return b"".join(frames)

    def restart(self) -> None:
        """Make ready for a repeated call.  In a stream, thinking that was shown stays open and the
        repeated call's is left out; a plain answer starts anew."""
        del self.reply.notes[self.noted:]       # what was noted of the failed call
        if not self.stream:
            self.reply.blocks.clear()
            self.reply.output_estimate = 0
            self.counts = dict.fromkeys(self.counts, 0)
        unclosed = self.unclosed if self.stream else None
        if unclosed is not None:
            unclosed.broken = False
        self.reading = Reading(live=unclosed, began=self.reading.began, notes=self.reading.notes,
                               one_call=self.reading.one_call,
                               mute_thinking=self.stream and self.shown)
        self.unclosed, self.lines = None, LineBuffer(self.upstream.skip)
        self.filters = choose_filters(self.asked, self.face.types) if self.asked else []
        self.over, self.error, self.lane, self.kept = False, None, None, 0

    def failure(self, error: ProxyError) -> bytes:
        """The frames that end an open stream with an error, behind all text that was held back."""
        frames: List[bytes] = []
        block, self.unclosed = self.unclosed, None
        if block is not None:
            block.broken, self.over = False, False
            for event in self.filtered(Close(block)):
                if isinstance(event, Delta):
                    self.show(event, frames)
            self.over = True
        return b"".join(frames) + self.late_notes() + self.face.frames(self.reply, Fail(error))

    def body(self) -> Json:
        """The whole answer, for a plain request."""
        return self.face.body(self.reply)

    def copy_deltas(self, lane: Lane, lines: bytes, at: int, frames: List[bytes]) -> int:
        """Copy all delta lines of the open block that stand here; gives where they end."""
        strings: List[bytes] = []
        match = lane.pattern.match
        found = match(lines, at)
        while found:
            name, string = found.groups()
            if lane.call_id and name != lane.call_id:
                break
            strings.append(string)
            at = found.end()
            found = match(lines, at)
        if strings:
            self.reply.output_estimate += escaped_length(strings)
            if not self.stream or self.face.keeps or lane.block.kind == TOOL:
                lane.block.pieces += strings
            if self.stream:
                frames.append(self.copied_frames(lane, strings))
        return at

    def copied_frames(self, lane: Lane, strings: List[bytes]) -> bytes:
        """A frame for each string, between the lane's prefix and suffix."""
        if not self.face.numbered:
            if len(strings) == 1:
                return lane.prefix + strings[0] + lane.suffix
            return lane.prefix + (lane.suffix + lane.prefix).join(strings) + lane.suffix
        first = self.reply.frames_sent
        self.reply.frames_sent += len(strings)
        return b"".join([b"%b%b%b%d%b" % (lane.prefix, string, lane.suffix, number, lane.end)
                         for number, string in enumerate(strings, first)])

    def read_line(self, line: bytes, frames: List[bytes]) -> None:
        """The ordinary way of one line: events, filters, frames."""
        was_over = self.over
        for event in self.upstream.read_line(self.reading, line):
            if not was_over:
                self.pass_on(event, frames)
        self.reply.cost = self.reading.cost
        self.lane = self.find_lane()

    def filtered(self, event: Event) -> List[Event]:
        """What the filters make of an event, one after another."""
        events = [event]
        for one in self.filters:
            events = [changed for given in events for changed in one.run(given)]
        return events

    def pass_on(self, event: Event, frames: List[bytes]) -> None:
        """Show what the filters make of an event, as long as the answer is not over."""
        for changed in self.filtered(event) if self.filters else (event,):
            if not self.over:
                self.show(changed, frames)

    def show(self, event: Event, frames: List[bytes]) -> None:
        """Fold an event into the reply and, in a stream, into frames.  Begin is held until
        something follows it: before that, an error can still be a status."""
        if isinstance(event, Delta):
            self.keep_delta(event)
        elif isinstance(event, Begin):
            return
        elif isinstance(event, Open):
            self.place_block(event.block)
        elif isinstance(event, Close):
            if event.block.broken:
                self.unclosed = event.block     # stays open: clients take a closed block for good
                return
        elif isinstance(event, End):
            event = self.settle_end(event)
        if isinstance(event, Fail):
            self.over, self.error = True, event.error
            return
        if not self.stream:
            return
        if not self.begun:
            self.begun = True
            frames.append(self.face.frames(self.reply, Begin()))
        if isinstance(event, End):
            frames.append(self.late_notes())
        frames.append(self.face.frames(self.reply, event))

    def place_block(self, block: Block) -> None:
        block.index = len(self.reply.blocks)
        block.number = self.counts[block.kind]
        self.counts[block.kind] += 1
        self.reply.blocks.append(block)
        if self.stream and block.kind == TOOL:
            self.visible = self.shown = True

    def keep_delta(self, event: Delta) -> None:
        """Keep what the body, or a face's closing frame, will need (a call's the waist keeps)."""
        block = event.block
        if block.kind != TOOL and (not self.stream or self.face.keeps):
            block.pieces.append(event.text)
        self.reply.output_estimate += len(event.text)
        self.shown = True
        self.visible = self.visible or (self.stream and block.kind != THINKING)

    def settle_end(self, event: End) -> Event:
        """Complete the reply, or make an empty answer cut by length the failure that it is."""
        reply = self.reply
        shown = self.shown and (self.stream or any(
            block.kind != TOOL or block.whole for block in reply.blocks))
        if event.reason == LENGTH and not shown and not self.allow_empty:
            return Fail(ProxyError("empty", "The answer reached max_tokens before anything could "
                                   "be shown: all went into thinking. Raise max_tokens or lower "
                                   "the effort (or set emptyResponsePolicy to allow)."))
        self.over = True
        reply.reason, reply.sequence, reply.usage = event.reason, event.sequence, self.reading.usage
        if reply.usage is None:
            reply.output_estimate = estimate_output(reply.output_estimate)
            add_note(reply.notes, "usage", "not told by the upstream")
        return event

    def late_notes(self) -> bytes:
        """Notes that came up after the response head, as SSE comments."""
        late = list(dict.fromkeys(self.reply.notes[self.noted:]))
        self.noted = len(self.reply.notes)
        return b"".join(comment_frame("note " + hide(note, self.secrets), self.comment_end)
                        for note in late[:20])

    def find_lane(self) -> Optional[Lane]:
        """The lane of the open block, the same as before while that block is open."""
        block = self.reading.live
        if block is None or block.index < 0 or block.half or self.over \
                or block.kind in self.touched or block.type != FUNCTION or self.reading.event:
            return None
        if block.kind == THINKING and self.reading.mute_thinking:
            return None
        if self.lane is not None and self.lane.block is block:
            return self.lane
        name = block.mark.encode("utf-8", "replace") if block.kind == TOOL else b""
        around = cut_frame(self.face, self.reply, block) if self.stream else (b"", b"", b"")
        pattern = re.compile(self.upstream.lanes[block.kind])   # at its first use: 0.2 to 5 ms each
        return Lane(pattern, block, name, *around)


# === PART: BACKENDS AND MODELS (pure) =======================================
# === CATALOGUE (pure) =======================================================
# The models of the vendor's own client 1.64.0, read 2026-11-20: the fallback
# when the live list cannot be had, and the only source of efforts, limits and
# plans, which that list lacks.  It moves weekly, so ids that are not in it are
# passed through.  Columns: wire id, name, context in tokens (0: not known),
# most output tokens (0: not known), input, efforts, least plan (hidden: not
# in the vendor's own list; -: not told).

CATALOGUE = """
deepseek/deepseek-v4-pro|DeepSeek V4 Pro|1000000|0|text|high max|Go
deepseek/deepseek-v4-flash|DeepSeek V4 Flash|1000000|0|text|high max|Go
deepseek/deepseek-v4-flash-vision-exp|DeepSeek V4 Flash Vision (exp)|1000000|0|vision|high max|Go
deepseek/deepseek-v4-flash-fast|DeepSeek V4 Flash Fast|1000000|0|text|low high max|Go
deepseek/deepseek-v4.1-flash|DeepSeek V4.1 Flash|1000000|0|vision|low high max|Go
moonshotai/Kimi-K3|Kimi K3|1000000|0|vision|low high max|Go
moonshotai/Kimi-K2.7-Code|Kimi K2.7 Code|256000|0|vision|-|Go
moonshotai/Kimi-K2.7-Code-Highspeed|Kimi K2.7 Code HighSpeed|262000|0|vision|-|Go
moonshotai/Kimi-K2.6|Kimi K2.6|256000|0|vision|-|Go
moonshotai/Kimi-K2.5|Kimi K2.5|256000|0|vision|-|Go
z-ai/glm-5.3-flash|GLM-5.3 Flash|1048576|131072|vision|low high max|Go
z-ai/glm-5.3-flashx|GLM-5.3 FlashX|1000000|131072|vision|low high max|Go
zai-org/GLM-5.3|GLM-5.3|1000000|0|text|low high max|Go
zai-org/GLM-5.2|GLM-5.2|1000000|0|text|high max|Go
zai-org/GLM-5.2-Fast|GLM-5.2 Fast|1000000|0|text|-|Go
zai-org/GLM-5.1|GLM-5.1|0|0|text|-|Go
zai-org/GLM-5|GLM-5|200000|0|text|-|Go
MiniMaxAI/MiniMax-M3|MiniMax M3|1000000|0|vision|low medium high|Go
MiniMaxAI/MiniMax-M2.7|MiniMax M2.7|0|0|text|-|Go
MiniMaxAI/MiniMax-M2.5|MiniMax M2.5|200000|0|text|-|Go
xiaomi/mimo-v2.6-pro|MiMo V2.6 Pro|1048576|0|vision|-|Go
xiaomi/mimo-v2.6-pro-ultraspeed|MiMo V2.6 Pro UltraSpeed|1048576|0|vision|-|GOAT
xiaomi/mimo-v2.6-flash|MiMo V2.6 Flash|1048576|0|vision|-|Go
xiaomi/mimo-v2.5-pro|MiMo V2.5 Pro|1000000|0|text|-|Go
xiaomi/mimo-v2.5|MiMo V2.5|1000000|0|vision|-|Go
Qwen/Qwen3.8-Omni-Flash|Qwen 3.8 Omni Flash|1000000|131072|vision|low medium xhigh|Go
Qwen/Qwen3.8-Max-0902|Qwen 3.8 Max 0902|1000000|0|vision|low medium xhigh|Go
Qwen/Qwen3.8-Max|Qwen 3.8 Max|1000000|0|vision|low medium xhigh|Go
Qwen/Qwen3.8-27B|Qwen 3.8 27B|262144|32768|vision|low medium xhigh|Go
Qwen/Qwen3.8-Flash|Qwen 3.8 Flash|1000000|0|vision|low medium xhigh|Go
Qwen/Qwen3.7-Max|Qwen 3.7 Max|1000000|0|text|-|Go
Qwen/Qwen3.7-Plus|Qwen 3.7 Plus|1000000|0|vision|-|Go
Qwen/Qwen3.7-Flash|Qwen 3.7 Flash|1000000|0|vision|-|Go
Qwen/Qwen3.6-Max-Preview|Qwen 3.6 Max Preview|0|0|text|-|Go
Qwen/Qwen3.6-Plus|Qwen 3.6 Plus|0|0|vision|-|Go
meituan/LongCat-2.0|LongCat 2.0|1048576|0|text|-|Go
stepfun/Step-5-Preview|Step 5 Preview|1000000|0|vision|low medium high|Go
stepfun/Step-3.7-Flash|Step 3.7 Flash|256000|0|vision|-|Go
stepfun/Step-3.5-Flash|Step 3.5 Flash|1000000|0|text|-|Go
tencent/hy3-paid|Tencent Hy3|262144|0|text|-|Go
tencent/hy4-preview|Tencent Hy4 Preview|1048576|0|text|low medium high|Go
nvidia/nemotron-3-ultra-550b-a55b|Nemotron 3 Ultra|1000000|0|text|-|Go
thinkingmachines/inkling|Inkling|256000|0|vision|-|Go
thinkingmachines/inkling-small|Inkling Small|1000000|0|vision|-|Go
poolside/laguna-s-2.1-free|Laguna S 2.1|256000|32768|text|-|Go
inclusionai/ling-3.0-flash-sante:free|Ling 3.0 Flash Sante|262144|32768|text|-|Go
claude-sonnet-5|Claude Sonnet 5|1000000|0|vision|low medium high xhigh max|Pro
claude-sonnet-4-6|Claude Sonnet 4.6|1000000|0|vision|low medium high xhigh max|Pro
claude-fable-5-1|Claude Fable 5.1|1000000|0|vision|low medium high xhigh max|Max
claude-fable-5|Claude Fable 5|1000000|0|vision|low medium high xhigh max|Max
claude-opus-5-5|Claude Opus 5.5|1000000|0|vision|low medium high xhigh max|Max
claude-opus-5|Claude Opus 5|1000000|0|vision|low medium high xhigh max|Max
claude-opus-4-8|Claude Opus 4.8|1000000|0|vision|low medium high xhigh max|Max
claude-opus-4-7|Claude Opus 4.7|1000000|0|vision|low medium high xhigh max|Max
claude-haiku-4-5-20251001|Claude Haiku 4.5|200000|0|vision|-|Pro
gpt-6-astra|GPT-6 Astra|1050000|0|vision|low medium high xhigh max|Max
gpt-6-sol|GPT-6 Sol|1050000|0|vision|low medium high xhigh max|Pro
gpt-6-luna|GPT-6 Luna|1050000|0|vision|low medium high xhigh max|Go
gpt-5.6-sol|GPT-5.6 Sol|1050000|0|vision|low medium high xhigh max|GOAT
gpt-5.6-terra|GPT-5.6 Terra|1050000|0|vision|low medium high xhigh max|Pro
gpt-5.6-luna|GPT-5.6 Luna|1050000|0|vision|low medium high xhigh max|Go
gpt-5.5|GPT-5.5|400000|0|vision|low medium high xhigh|Pro
gpt-5.4|GPT-5.4|400000|0|vision|low medium high xhigh|Pro
gpt-5.3-codex|GPT-5.3 Codex|400000|0|vision|low medium high xhigh|Pro
gpt-5.4-mini|GPT-5.4 Mini|400000|0|vision|low medium high|Pro
google/gemini-3.8-flash|Gemini 3.8 Flash|1000000|0|vision|low medium high|GOAT
google/gemini-3.7-flash|Gemini 3.7 Flash|1048576|0|vision|low medium high|GOAT
google/gemini-3.6-flash|Gemini 3.6 Flash|1000000|0|vision|low medium high|Pro
google/gemini-3.5-flash|Gemini 3.5 Flash|1000000|0|vision|low medium high|Pro
google/gemini-3.5-flash-lite|Gemini 3.5 Flash Lite|1000000|0|vision|low medium high|Pro
google/gemini-3.1-flash-lite|Gemini 3.1 Flash Lite|1000000|0|vision|low medium high|Pro
sakana/fugu-ultra|Fugu Ultra|1000000|0|vision|high xhigh|Max
meta/muse-spark-1.1|Muse Spark 1.1|1048576|0|vision|low medium high xhigh|Pro
meta/muse-spark-1.2|Muse Spark 1.2|1048576|0|vision|low medium high xhigh|GOAT
meta/muse-spark-1.2-contributor|Muse Spark 1.2 Contributor|1048576|0|vision|low medium high xhigh|Go
meta/muse-spark-1.3|Muse Spark 1.3|1048576|0|vision|low medium high xhigh max|GOAT
meta/muse-spark-1.3-contributor|Muse Spark 1.3 Contributor|1048576|0|vision|low medium high xhigh|Go
xai/grok-4.5|Grok 4.5|500000|0|vision|low medium high|Go
xai/grok-4.6|Grok 4.6|500000|0|vision|low medium high xhigh|GOAT
xai/grok-4.7|Grok 4.7|500000|0|vision|low medium high xhigh|GOAT
minimax/minimax-m3-free|MiniMax M3|1000000|0|vision|low medium high|hidden
minimax/minimax-m2.7-free|MiniMax M2.7|197000|0|text|-|hidden
meituan/LongCat-2.0:free|LongCat 2.0|1048576|0|text|-|hidden
tencent/Hy3|Tencent Hy3 (Free)|262144|0|text|-|hidden
inclusionai/ling-3.0-flash-free|Ling 3.0 Flash|256000|32768|text|-|-
"""


# === MODELS (pure) ==========================================================
# Which model a request means and what that model takes: aliases, ids in any case,
# short names, other services' spellings, efforts, output limits.  Unknown names are
# passed on, as the catalogue is always behind; a note names the most similar model.

EFFORTS = ("low", "medium", "high", "xhigh", "max")     # rising
EFFORT_WORDS = {"minimal": "low", "none": "", "off": ""}     # words the upstream refuses
DECISION_MODELS = ("typesafe/jev", "jev", "jev-latest", "typesafe-ai/jev")
MODEL_NAME = re.compile(r"[!-~]{1,200}")
# Suffixes that say how a model runs, not which model: Claude Code's context size (opus[1m]),
# OpenRouter's routing variants (openrouter.ai/docs/guides/routing/model-variants/overview) and
# Ollama's default tag.  OpenRouter's :free is a model of its own and never the paid one.
NAME_SUFFIX = re.compile(r"(\[[0-9a-z]+\]|:(nitro|floor|exacto|online|latest))$")
NAME_DATE = re.compile(r"-20[0-9]{2}(-?[0-9]{2}){2}$")
DASHES = str.maketrans(".:", "--")      # claude-sonnet-4.6 at OpenRouter is claude-sonnet-4-6
MAX_LIVE_MODELS = 1000      # ten times the upstream's present list, all of which clients get
MAX_ENDPOINTS = 16          # of one model; each request looks at them
MAX_CONTEXT = 10 ** 9       # tokens
MAX_MOMENT = 32_503_680_000     # epoch seconds: the year 3000

# A family's name stands for its present flagship, where no catalogue id matches.
SHORT_NAMES = {
    "claude": "claude-sonnet-5", "sonnet": "claude-sonnet-5", "opus": "claude-opus-5-5",
    "haiku": "claude-haiku-4-5-20251001", "fable": "claude-fable-5-1", "gpt": "gpt-6-sol",
    "codex": "gpt-5.3-codex", "deepseek": "deepseek/deepseek-v4-pro",
    "deepseek-pro": "deepseek/deepseek-v4-pro", "deepseek-flash": "deepseek/deepseek-v4-flash",
    "kimi": "moonshotai/Kimi-K3", "glm": "zai-org/GLM-5.3", "glm-flash": "z-ai/glm-5.3-flash",
    "minimax": "MiniMaxAI/MiniMax-M3", "mimo": "xiaomi/mimo-v2.6-pro", "qwen": "Qwen/Qwen3.8-Max",
    "qwen-flash": "Qwen/Qwen3.8-Flash", "longcat": "meituan/LongCat-2.0",
    "step": "stepfun/Step-5-Preview", "hunyuan": "tencent/hy4-preview",
    "nemotron": "nvidia/nemotron-3-ultra-550b-a55b", "inkling": "thinkingmachines/inkling",
    "laguna": "poolside/laguna-s-2.1-free", "ling": "inclusionai/ling-3.0-flash-free",
    "gemini": "google/gemini-3.8-flash", "fugu": "sakana/fugu-ultra",
    "muse": "meta/muse-spark-1.3", "grok": "xai/grok-4.7"}


class Model(NamedTuple):
    """One model; 0 stands for a number that is not known."""

    id: str
    name: str
    context: int = 0
    max_output: int = 0
    vision: bool = True
    efforts: Optional[Tuple[str, ...]] = None       # None: not known; (): takes none
    plan: str = ""
    endpoints: Tuple[str, ...] = ()
    created: int = 0                                # epoch seconds, as the live list tells it
    owner: str = "command-code"                     # the backend's name, as lists show it
    needs_limit: bool = True                        # max_tokens is sent also where none was asked


class Models(NamedTuple):
    """All that is known of models: `known` by lower-case id, `bare` lower-case ids by their short
    forms, `listed` ids in the order in which they are shown."""

    known: Dict[str, Model]
    bare: Dict[str, str]
    listed: List[str]


def short_forms(name: str) -> Tuple[str, ...]:
    """Forms of a lower-case name without its vendor, the most exact first: as it is, without a
    date at its end, and both with dashes for dots."""
    short = name.rpartition("/")[2]
    undated = NAME_DATE.sub("", short)
    return short, undated, short.translate(DASHES), undated.translate(DASHES)


def index_models(models: List[Model], listed: List[str]) -> Models:
    """Models by lower-case id, and by short form: where two models share one, the model with the
    more exact form, then the earlier model."""
    known = {model.id.lower(): model for model in models}
    bare: Dict[str, str] = {}
    for forms in zip(*map(short_forms, known)):
        for form, name in zip(forms, known):
            bare.setdefault(form, name)
    bare.pop("", None)
    return Models(known, bare, listed)


def builtin_models() -> Models:
    """The models of CATALOGUE, of which the hidden ones are not listed."""
    models, listed = [], []
    for row in CATALOGUE.strip().splitlines():
        name, title, context, output, kinds, efforts, plan = row.split("|")
        models.append(Model(name, title, int(context), int(output), kinds == "vision",
                            tuple(efforts.split()) if efforts != "-" else (),
                            "" if plan in ("-", "hidden") else plan))
        if plan != "hidden":
            listed.append(name)
    return index_models(models, listed)


def live_number(value: Any, most: int) -> int:
    """A positive number of the live list; 0 for another type (bool too) or above `most`."""
    return int(value) if type(value) in (int, float) and 0 < value <= most else 0


def read_live_model(row: Any, known: Mapping[str, Model]) -> Optional[Model]:
    """A row of the live list merged into the known entry of its model; None without a usable id,
    and for a model without chat.  Members of the wrong type are ignored."""
    name = row.get("id") if isinstance(row, dict) else None
    if not isinstance(name, str) or not MODEL_NAME.fullmatch(name) or \
            name.lower() in DECISION_MODELS:
        return None
    model = known.get(name.lower(), Model(name, name))
    title, endpoints = row.get("name"), row.get("supported_endpoints")
    title = clean_text(title).strip()[:200] if isinstance(title, str) else ""
    endpoints = endpoints[:MAX_ENDPOINTS] if isinstance(endpoints, list) else ()
    return model._replace(
        id=name, name=title or model.name,
        context=live_number(row.get("context_length"), MAX_CONTEXT) or model.context,
        endpoints=tuple(one for one in endpoints if isinstance(one, str)),
        created=live_number(row.get("created"), MAX_MOMENT))


def merge_live_models(live: Any, builtin: Models) -> Optional[Models]:
    """The live list (GET /provider/v1/models) enriched by the built-in one; None if unusable.
    Of rows whose ids differ in case alone, the first counts."""
    rows = live.get("data") if isinstance(live, dict) else None
    found: Dict[str, Model] = {}
    for row in rows if isinstance(rows, list) else ():
        model = read_live_model(row, builtin.known)
        if model is not None:
            found.setdefault(model.id.lower(), model)
        if len(found) == MAX_LIVE_MODELS:
            break
    merged = list({**builtin.known, **found}.values())
    return index_models(merged, [model.id for model in found.values()]) if found else None


def fits_pattern(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern with `*` in it.  Takes linear time, which a regular expression
    with several `.*` does not: a name may be as long as a request."""
    first, *pieces, last = pattern.split("*")
    at = len(first)
    for piece in pieces:
        found = name.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    return name.startswith(first) and name.endswith(last) and at <= len(name) - len(last)


def find_model(name: str, models: Models) -> Optional[Model]:
    """The catalogue's model of this name: its id in any case, else a short form of it.  The
    vendor is ignored then, as other services use other names for vendors."""
    lower = name.lower()
    if lower in models.known:
        return models.known[lower]
    plain = NAME_SUFFIX.sub("", lower)
    found = [models.bare.get(form, "") for form in short_forms(plain)]
    ids = [plain, *found, SHORT_NAMES.get(plain, "").lower()]
    return next((models.known[model_id] for model_id in ids if model_id in models.known), None)


def letter_pairs(name: str) -> FrozenSet[str]:
    """The pairs of adjacent letters in a name without its vendor, its ends marked by spaces."""
    text = " %s " % name.lower().rpartition("/")[2]
    return frozenset(text[at:at + 2] for at in range(len(text) - 1))


@lru_cache(maxsize=64)          # a client sends the same unknown name with every request
def nearest_ids(name: str, ids: Tuple[str, ...]) -> Tuple[str, ...]:
    """Up to three ids that are similar to a name, the most similar first: by the share of common
    letter pairs (Dice's coefficient), in linear time, unlike difflib's ratio."""
    wanted = letter_pairs(name)
    shares = [2 * len(wanted & pairs) / (len(wanted) + len(pairs))
              for pairs in map(letter_pairs, ids)]
    order = sorted(range(len(ids)), key=lambda at: -shares[at])
    return tuple(ids[at] for at in order[:3] if shares[at] >= 0.4)


def fit_effort(asked: Optional[str], model: Model, notes: List[str]) -> Optional[str]:
    """The effort to send: what was asked, else the nearest lower that the model takes, else its
    lowest; None to leave the choice to the model."""
    taken = EFFORTS if model.efforts is None else model.efforts
    if not asked:
        return None
    if asked in taken:
        return asked
    word = EFFORT_WORDS.get(asked, asked)
    falling = EFFORTS[EFFORTS.index(word)::-1] + taken[:1] if word in EFFORTS else ()
    fitted = next((one for one in falling if one in taken), None)
    add_note(notes, "effort", "%s -> %s" % (printable(asked, 60), fitted or "the model's own"))
    return fitted


def most_output(model: Model) -> int:
    """The largest max_tokens that is sent upstream for a model."""
    return min(model.max_output or MAX_OUTPUT_TOKENS, MAX_OUTPUT_TOKENS)


def fit_max_tokens(asked: Optional[int], model: Model, notes: List[str]) -> int:
    """max_tokens to send: the default, or what was asked within the model's limit; 1 for 0, with
    which no upstream is called."""
    most = most_output(model)
    if asked is None:
        return min(DEFAULT_OUTPUT_TOKENS, most)
    if asked > most:
        add_note(notes, "clamped", "max_tokens %d -> %d" % (asked, most))
    return max(1, min(asked, most))


# === MODELS ALLOWED (pure) ==================================================
# Which of the models are served here: those of allowedModels, but for the ones
# that `models` switches off, and unknown ones only where allowUnknownModels lets
# them through.  A model is meant by whatever name stands for it.


def aliased(name: str, config: Config) -> str:
    """What `default` or an alias stands for, an exact one or else the longest pattern that fits
    (any case); any other name unchanged."""
    name = config.default_model if name == "default" else name
    if not config.model_aliases:
        return name
    asked = name.lower()
    targets = {alias.lower(): target for alias, target in config.model_aliases.items()}
    if asked in targets:
        return targets[asked]
    for pattern in sorted(targets, key=len, reverse=True):
        if "*" in pattern and fits_pattern(asked, pattern):
            return targets[pattern]
    return name


def meant_id(name: str, models: Models, config: Config) -> str:
    """The lower-case id of the model that a configured name stands for; the name itself if it is
    unknown.  An exact id means its own model, even if an alias has the same name."""
    if name.lower() in models.known:
        return name.lower()
    name = aliased(name, config)
    found = find_model(name, models)
    return (found.id if found else name).lower()


def names_of(model: str, names: Iterable[str], models: Models, config: Config) -> FrozenSet[str]:
    """The configured names that stand for the model with this id."""
    wanted = model.lower()
    return frozenset(name for name in names
                     if name.lower() == wanted or meant_id(name, models, config) == wanted)


def switched_off(models: Models, config: Config) -> FrozenSet[str]:
    """Ids in lower case of the models that are switched off."""
    return frozenset(meant_id(row["id"], models, config)
                     for row in config.models if not row["enabled"])


def served_test(models: Models, config: Config) -> Callable[[str], bool]:
    """A function that tells whether requests may name an id."""
    off = switched_off(models, config)
    allowed = {meant_id(name, models, config) for name in config.allowed_models}
    return lambda name: name.lower() not in off and (not allowed or name.lower() in allowed)


def served_ids(models: Models, config: Config) -> Tuple[str, ...]:
    """Ids of the listed models that a request may name."""
    return tuple(filter(served_test(models, config), models.listed))


def unknown_model(name: str, ids: Tuple[str, ...],
                  words: str = "There is no model %s (GET /v1/models lists them).") -> ProxyError:
    near = nearest_ids(name[:200], ids)
    return ProxyError("model", words % printable(name, 100) + (
        " Nearest: %s." % ", ".join(near) if near else ""), param="model")


def refuse_switched_off(found: str, models: Models, config: Config) -> None:
    if config.models and found.lower() in switched_off(models, config):
        raise unknown_model(found, served_ids(models, config),
                            "Model %s is switched off here (the option models).")


def not_allowed(name: str, config: Config) -> ProxyError:
    return ProxyError("model", "Model %s is not allowed here. Allowed: %s." % (
        printable(name, 100), redact(", ".join(config.allowed_models[:20]))), param="model")


def check_allowed(name: str, model: Optional[Model], models: Models, config: Config) -> None:
    """Refuse what models, allowedModels or allowUnknownModels do not let through (404)."""
    allowed, found = config.allowed_models, model.id if model else name
    refuse_switched_off(found, models, config)
    if allowed and not names_of(found, allowed, models, config):
        raise not_allowed(name, config)
    if model is None and not config.allow_unknown_models:
        raise unknown_model(name, served_ids(models, config))


def note_unknown_model(name: str, models: Models, config: Config, notes: List[str]) -> None:
    """Name the nearest model; a name unlike every known one is new rather than misspelt."""
    for near in nearest_ids(name, served_ids(models, config))[:1]:
        add_note(notes, "model", "%s is not a known model, passed on (nearest: %s)" % (
            printable(name, 48), near))


OWN_PREFIX = re.compile(r"\Acommandcode/", re.I)     # names Command Code explicitly


def resolve_model(asked: str, models: Models, config: Config, notes: List[str]) -> Model:
    """The model that a request's `model` means.  Raises ProxyError `model` (404) or `invalid`."""
    name = OWN_PREFIX.sub("", aliased(asked or "default", config))
    if name.lower() in DECISION_MODELS:
        raise ProxyError("invalid", "%s is a decision model without chat; name another model."
                         % printable(name, 100), param="model")
    if not MODEL_NAME.fullmatch(name):
        raise ProxyError("invalid", "model must be 1 to 200 ASCII characters without spaces.",
                         param="model")
    found = find_model(name, models)
    check_allowed(name, found, models, config)
    model = found or Model(name, name)
    if asked and model.id != asked:
        add_note(notes, "model", redact("%s -> %s" % (asked, model.id)))
    if found is None:
        note_unknown_model(name, models, config, notes)
    return model


# === MODEL LISTS (pure) =====================================================
# What GET /v1/models answers, in OpenAI's shape and in Anthropic's: a person's
# own aliases first, then the live or built-in list, as far as it is allowed.


def listed_models(models: Models, config: Config) -> List[Model]:
    """What /v1/models shows: a person's own aliases, then the list but for ids that these hide."""
    is_served = served_test(models, config)
    named, hidden = [], {alias.lower() for alias in config.model_aliases}
    for alias, target in sorted(config.model_aliases.items()):
        model = find_model(target, models) or Model(target, target)
        if "*" not in alias and is_served(model.id):
            named.append(model._replace(id=alias, name="%s (%s)" % (alias, model.name)))
    return named + [models.known[name.lower()] for name in filter(is_served, models.listed)
                    if name.lower() not in hidden]


def openai_model(model: Model) -> Json:
    """A model as OpenAI lists it; `created` is the upstream's, 0 for one that is not live."""
    told = {"context_length": model.context, "max_output_tokens": model.max_output}
    return {"id": model.id, "object": "model", "created": model.created,
            "owned_by": model.owner, "name": model.name,
            **{name: number for name, number in told.items() if number}}


def describe_model(model: Model) -> str:
    """A model described in a sentence, without what is unknown of it (efforts None: not in the
    catalogue, which alone tells input and plan)."""
    return "; ".join(filter(None, [
        "%s at %s" % (model.name, model.owner.replace("command-code", "Command Code")),
        "%d tokens of context" % model.context if model.context else "",
        "" if model.efforts is None else "text and image input" if model.vision else "text input",
        "effort " + ", ".join(model.efforts) if model.efforts else "",
        "from the %s plan on" % model.plan if model.plan else ""])) + "."


def anthropic_model(model: Model) -> Json:
    """A model as Anthropic lists it (platform.claude.com/docs/en/api/models/list), and a
    description.  `created_at` may be the epoch for an unknown date there, an unknown context null;
    `max_tokens` is the largest value of that parameter, which here is known of every model."""
    from datetime import datetime, timezone         # rarely wanted, so not at start
    created = datetime.fromtimestamp(model.created, timezone.utc)
    return {"type": "model", "id": model.id, "display_name": model.name,
            "description": describe_model(model), "lifecycle": "active",
            "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "max_input_tokens": model.context or None, "max_tokens": most_output(model)}


def model_entry(model: Model) -> Json:
    """All that is known of a model, null for what is not."""
    return {"id": model.id, "name": model.name, "context": model.context or None,
            "max_output": model.max_output or None, "vision": model.vision,
            "efforts": None if model.efforts is None else list(model.efforts),
            "plan": model.plan or None}


def ollama_model(model: Model) -> Json:
    """A model as Ollama's /api/tags lists it; of a file that is not there nothing is told."""
    entry: Json = {"name": model.id, "model": model.id, "modified_at": "1970-01-01T00:00:00Z",
                   "size": 0, "digest": "", "details": {
                       "parent_model": "", "format": "", "family": "", "families": [],
                       "parameter_size": "", "quantization_level": ""}}
    return {**entry, "context_length": model.context} if model.context else entry


def ollama_details(model: Model) -> Json:
    """A model as Ollama's /api/show tells it."""
    info: Json = {"general.architecture": "command-code", "general.basename": model.name}
    if model.context:
        info["command-code.context_length"] = model.context
    thinks = ["thinking"] if model.efforts else []
    return {"details": ollama_model(model)["details"], "model_info": info,
            "modified_at": "1970-01-01T00:00:00Z",
            "capabilities": ["completion", "tools"] + ["vision"] * model.vision + thinks}


def openai_model_list(shown: List[Model]) -> Json:
    return {"object": "list", "data": [openai_model(model) for model in shown]}


def anthropic_model_list(shown: List[Model]) -> Json:
    data = [anthropic_model(model) for model in shown]
    return {"data": data, "has_more": False, "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None}


# === PART: ACCOUNTS (pure) ==================================================
# === KEYS (pure) ============================================================
# What who brings no key is told, and the ids of a caller's conversation (the
# keys themselves are read in KEY RINGS).  Ids are derived, never stored: the same
# key and conversation give the same id in any process on any host, and no two
# callers can share or guess one.

SESSION_FIELDS = ("x-claude-code-session-id", "x-session-id", "session-id", "session_id")
TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
KEY_FIELDS = (("authorization", "Authorization"), ("x-api-key", "x-api-key"),
              ("api-key", "api-key"))       # in this order; how a person writes them
SCHEME = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]+(?![ \t=])")


def key_text(fields: Fields, name: str) -> str:
    """What a header holds as a key.  In Authorization that follows Bearer, Token or no scheme;
    "" for the credentials of any other scheme (RFC 9110 11.4)."""
    value = fields.get(name, "").strip(" \t")
    found = SCHEME.match(value) if name == "authorization" else None
    if found is None or KEY_PATTERN.search(found[1]):
        return value
    return value[found.end():] if found[1].lower() in ("bearer", "token") else ""


def is_same_secret(one: str, other: str) -> bool:
    """Compare in a time that tells neither content nor length."""
    digests = [hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in (one, other)]
    return hmac.compare_digest(*digests)


PLACEHOLDER = re.compile(        # also U+2026 in UTF-8, as a header is read
    "user_(x{3,}|[*]*)([.]|\u2026|\xe2\x80\xa6)+|user_(x{3,}|[*]+|[<\\[{].*)|"
    "user_(your|my|the)?[-_]?((command|code|api)[-_]?)*(key|token)([-_]?here)?", re.I)
VENDOR_KEYS = {     # how keys of other vendors begin
    "sk-ant-": "Anthropic", "sk-or-": "OpenRouter", "sk-": "OpenAI or the like", "gsk_": "Groq",
    "AIza": "Google", "xai-": "xAI", "ghp_": "GitHub", "github_pat_": "GitHub",
    "hf_": "Hugging Face"}


def mistaken_key(given: str) -> str:
    """What stands in a key's place by mistake: a placeholder, another vendor's key; "" for none."""
    if PLACEHOLDER.fullmatch(given):
        return "the placeholder of the README"
    return next(("a key of %s (%s...)" % (vendor, start) for start, vendor in VENDOR_KEYS.items()
                 if given.startswith(start)), "")


OWN_KEY = ("send your own as `Authorization: Bearer user_...` or `x-api-key: user_...` "
           "(commandcode.ai, settings, API keys).")


def missing_key(fields: Fields, client_key: bool = False) -> ProxyError:
    """The 401 for a request without a key: what is expected, never what was sent.  `client_key`:
    one is set, and what was sent is not it."""
    sent = {fields.get(name, "").strip().lower() for name, _ in KEY_FIELDS}
    given = sent != {""}
    mistakes = [mistaken_key(key_text(fields, name)) for name, _ in KEY_FIELDS]
    if given and sent <= {"", "bearer", "token"}:
        mistakes = ["empty (is the variable set that should hold it?)"]
    problem = "The key sent is not a Command Code key" if given else "No key was sent"
    if given and client_key:
        problem = "The clientKey sent is wrong, and it is not a Command Code key either"
    problem += ", but ".join(["", *filter(None, mistakes)][:2])
    either = "ask the proxy's operator for the clientKey, or " if client_key else ""
    return ProxyError("authentication", "%s: %s%s" % (problem, either, OWN_KEY))


def inner_session(user_id: str) -> str:
    """The session_id in a user id that is JSON, else the user id itself."""
    try:
        inner = json.loads(user_id) if user_id.startswith("{") else None
    except (ValueError, RecursionError):
        inner = None
    session = inner.get("session_id") if isinstance(inner, dict) else None
    return session if isinstance(session, str) and session else user_id


def session_value(fields: Fields, user_id: Any) -> str:
    """How the client itself names this conversation; "" when it does not.  `user_id` is Messages'
    metadata.user_id: Claude Code puts JSON with a session_id into it."""
    for name in SESSION_FIELDS:
        if fields.get(name):
            return fields[name][:MAX_SESSION_VALUE]
    return inner_session(user_id)[:MAX_SESSION_VALUE] if isinstance(user_id, str) else ""


def derive_session(key: str, session: str, first_message: str) -> str:
    """Id of a conversation as a strict UUID (version 4, RFC 4122 variant): an HMAC with the key as
    secret, over the client's own name for the conversation or, without one, over its first user
    message."""
    subject = "session\n" + session if session else "message\n" + first_message
    digest = hmac.digest(key.encode(), subject.encode("utf-8", "replace"), "sha256").hex()
    variant = "89ab"[int(digest[16], 16) & 3]
    return "-".join((digest[:8], digest[8:12], "4" + digest[13:16], variant + digest[17:20],
                     digest[20:32]))


def choose_traceparent(given: str, fresh: str) -> str:
    """The caller's traceparent where it is valid (W3C Trace Context), else one of 48 hex digits."""
    if TRACEPARENT.fullmatch(given):
        return given
    return "00-%s-%s-01" % (fresh[:32], fresh[32:48])


# === KEY RINGS (pure) =======================================================
# A caller may bring several keys at once, in one header: `user_a,user_b` or
# `work=user_a,home=user_b;weight=2`.  They are that caller's ring for that one
# request.  A header that holds one key is read as tolerantly as ever (R1).  In a
# list, empty entries count for nothing, an entry without a key is left out with a
# note, and an entry with a key is read strictly, for a slip would silently leave an
# account unused.  An entry is told by its place in the list, never as it was sent.

MAX_RING_KEYS = 32      # each is an account of one caller; 32 fit into a head of 4 KiB
MAX_RING_WEIGHT = 1000
MAX_SENT_SECRETS = 64   # of one request, that are looked for in what is shown
NO_SECRETS = ("bearer", "token", "user_", "user_...", "key")   # schemes, what stands for a key
RING_SHAPE = "[name=]user_...[;weight=N], ..."
RING_ENTRY = re.compile(
    r'(?:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,31})\s*=\s*)?'
    r'["\']?(?P<key>user_[A-Za-z0-9_-]+)["\']?'
    r'(?:\s*;\s*weight\s*=\s*(?P<weight>[0-9]{1,4}(?:\.[0-9]{1,3})?))?')
LONE_KEY = re.compile(r"(?:Bearer )?(user_[A-Za-z0-9_-]+)")
AROUND_ENTRY = " \t\"'"      # white space and quotes


@dataclass(frozen=True, **SLOTS)
class RingKey:
    """One key that may serve; its repr holds neither the key nor its digest."""

    key: str = field(repr=False)
    digest: str = field(repr=False)         # the whole SHA-256: what is learned is kept under it
    name: str = ""                          # the caller's or operator's own word for it
    weight: float = 1.0
    max_in_flight: int = 0                  # 0: as the option says
    allowed_models: Tuple[str, ...] = ()    # lower case; (): all

    @property
    def shown(self) -> str:
        return "key:" + self.digest[:6]     # the same as key_name(key)


def new_ring_key(key: str, **known: Any) -> RingKey:
    return RingKey(key, hashlib.sha256(key.encode()).hexdigest(), **known)


def key_words(key: RingKey) -> str:
    return "%s (%s)" % (key.shown, key.name) if key.name else key.shown


def ring_entries(value: str) -> List[str]:
    """The entries of a list that are not empty (RFC 9110 5.6.1), without quotes, white space and
    the scheme: two headers arrive as `Bearer user_a, Bearer user_b`."""
    entries = [re.sub(r"(?i)^(bearer|token)[ \t]+", "", entry.strip(AROUND_ENTRY))
               for entry in value.split(",")]
    return [entry for entry in (one.strip(AROUND_ENTRY) for one in entries) if entry]


def parse_ring_entry(entry: str, place: str) -> RingKey:
    """One entry of a list of keys; `place` says which in errors.  Raises ProxyError `invalid`."""
    found = RING_ENTRY.fullmatch(entry)
    if found is None or KEY_LIKE.search(found["name"] or ""):
        raise ProxyError("invalid", "%s is not understood. A ring of keys is written %s with "
                         "names of up to 32 letters, digits, dots, dashes." % (place, RING_SHAPE))
    weight = float(found["weight"] or 1)
    if not 0 < weight <= MAX_RING_WEIGHT:
        raise ProxyError("invalid", "%s: weight must be above 0 and at most %d."
                         % (place, MAX_RING_WEIGHT))
    return new_ring_key(found["key"], name=found["name"] or "", weight=weight)


def merge_ring(keys: Iterable[RingKey], where: str,
               fault: str = "invalid") -> Tuple[RingKey, ...]:
    """Each key once, as its first entry has it.  Raises ProxyError of kind `fault` for two keys
    of one name: nobody could tell them apart."""
    merged: Dict[str, RingKey] = {}
    for key in keys:
        merged.setdefault(key.digest, key)
    names = [key.name for key in merged.values() if key.name]
    if len(names) != len(set(names)):
        raise ProxyError(fault, "%s gives one name to two keys." % where)
    return tuple(merged.values())


def anchor_of(keys: Tuple[RingKey, ...]) -> RingKey:
    """The key under which what belongs to the whole ring is kept, whatever its order."""
    return min(keys, key=lambda key: key.digest)


OTHER_KEY_FIELDS = frozenset(name for name, _ in KEY_FIELDS[1:])


def sent_secrets(fields: Fields) -> List[str]:
    """All that a request's headers hold as keys, those of lists and of any scheme too."""
    lone = LONE_KEY.fullmatch(fields.get("authorization", ""))
    if lone and OTHER_KEY_FIELDS.isdisjoint(fields):
        return [lone[1]]        # nearly always
    found: List[str] = []
    for name, _ in KEY_FIELDS:
        value = fields.get(name)
        lone = LONE_KEY.fullmatch(value) if value else None
        if lone:
            found.append(lone[1])
        elif value:
            entries = [entry for entry in ring_entries(value)[:MAX_RING_KEYS]
                       if entry.lower() not in NO_SECRETS]
            words = entries + [entry.rpartition(" ")[2] for entry in entries
                               if entry.rpartition(" ")[2].lower() not in NO_SECRETS]
            found += KEY_PATTERN.findall(value)[:MAX_RING_KEYS]
            found += [word for word in words if len(entries) == 1 or len(word) >= SHORT_SECRET]
    return found[:MAX_SENT_SECRETS]


def note_left_out(entries: List[str], where: str, client_key: str, notes: List[str]) -> None:
    """A note for each entry of a list that is neither a key nor the clientKey."""
    strange = [(number, entry) for number, entry in enumerate(entries, 1)
               if not KEY_PATTERN.search(entry)]
    for number, entry in strange[:MAX_RING_KEYS]:
        if not is_same_secret(entry, client_key):
            add_note(notes, "left_out", "%s, entry %d: not a Command Code key" % (where, number))


def parse_ring(value: str, where: str, notes: Optional[List[str]] = None,
               client_key: str = "") -> Tuple[RingKey, ...]:
    """The keys in a header's value, in its order; () when it holds none at all.  `notes` take what
    is left out.  Raises ProxyError `invalid` for an entry with a key that is not wholly
    understood."""
    found = KEY_PATTERN.findall(value)
    if not found:
        return ()
    entries = ring_entries(value)
    note_left_out(entries, where, client_key, [] if notes is None else notes)
    keyed = [(number, entry) for number, entry in enumerate(entries, 1)
             if KEY_PATTERN.search(entry)]
    listed = len(keyed) > 1 and len(set(found)) > 1
    if not listed and not all(RING_ENTRY.fullmatch(entry) for _, entry in keyed):
        return (new_ring_key(found[0]),)        # a key with something around it (R1)
    if len(keyed) > MAX_RING_KEYS:
        raise ProxyError("invalid", "%s: a ring holds at most %d keys." % (where, MAX_RING_KEYS))
    return merge_ring([parse_ring_entry(entry, "%s, entry %d" % (where, number))
                       for number, entry in keyed], where)


def ring_in(fields: Fields, notes: Optional[List[str]] = None,
            client_key: str = "") -> Tuple[RingKey, ...]:
    """The caller's own keys from the first of KEY_FIELDS that holds any (R1); () for none."""
    lone = LONE_KEY.fullmatch(fields.get("authorization", ""))
    if lone:                        # nearly always
        return (new_ring_key(lone[1]),)
    for name, where in KEY_FIELDS:
        keys = parse_ring(key_text(fields, name), where, notes, client_key)
        if keys:
            return keys
    return ()


# === OPERATOR KEYS (pure) ===================================================
# Keys that whoever runs the proxy lends to callers without one of their own:
# off by default, for a person alone or a small team.  Here: reading them from
# the texts of their sources, and the decision who may use them.  A caller's own
# key always wins.  Reading files and the environment is the shell's work.

MAX_OPERATOR_KEYS = 256
FORWARDED = re.compile("via|forwarded|x-forwarded.*|x-original-.*|x-real-ip|x-envoy-.*|cdn-loop|"
                       "cf-.*|(x-|true-|fly-|x-cluster-)client-ip")     # what proxies add
CREDENTIAL_VARIABLES = ("COMMANDCODE_CREDENTIALS", "COMMANDCODE_API_KEYS", "COMMANDCODE_API_KEY")
CLI_FILES = ("~/.commandcode/auth.json", "~/.config/commandcode/auth.json")
OPERATOR_KEY = re.compile(KEY_PATTERN.pattern + "|(?!user_)[A-Za-z0-9._~+/-]{8,512}")


@dataclass(frozen=True)
class Operator:
    """The operator's keys and who may use them."""

    keys: Tuple[RingKey, ...] = ()
    client_key: str = field(default="", repr=False)
    loopback: bool = False
    source: str = ""                        # where the keys came from


class Caller(NamedTuple):
    """Whose request it is: the keys that may serve it, the digest under which its rate is
    limited, whether the keys are the operator's, and notes of what else was sent as a key."""

    keys: Tuple[RingKey, ...]
    digest: str
    operator: bool = False
    notes: Tuple[str, ...] = ()
    refusal: Optional[ProxyError] = None    # there are no keys: why, and vendors alone will do


def credential_fault(source: str, place: str, problem: str) -> ProxyError:
    return ProxyError("config", "%s: %s %s" % (source, place, problem))


def is_number(value: Any, *types: type) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


# Members of a credential besides its key and id: name here, name there, default, what it must be.
CREDENTIAL_MEMBERS: Tuple[Tuple[str, str, Any, Callable[[Any], bool], str], ...] = (
    ("weight", "weight", 1, lambda value: is_number(value, int, float) and
     0 < value <= MAX_RING_WEIGHT, "a number above 0, at most %d" % MAX_RING_WEIGHT),
    ("max_in_flight", "maxInFlight", 0, lambda value: is_number(value, int) and value >= 0,
     "a whole number, 0 or more"),
    ("enabled", "enabled", True, lambda value: isinstance(value, bool), "true or false"),
    ("allowed_models", "allowedModels", [], lambda value: isinstance(value, list) and all(
        isinstance(one, str) for one in value), "a list of model ids"))


ROW_NAMES = {"api_key": "apiKey", "key": "apiKey", "token": "apiKey", "name": "id",
             "allowed_models": "allowedModels", "max_in_flight": "maxInFlight"}


def credential_members(row: Json, source: str, place: str) -> Json:
    """The members besides key and id, by our names.  Raises ProxyError `config`."""
    known: Json = {}
    for ours, theirs, default, fits, words in CREDENTIAL_MEMBERS:
        known[ours] = default if row.get(theirs) is None else row[theirs]
        if not fits(known[ours]):
            raise credential_fault(source, place, "%s must be %s" % (theirs, words))
    known["allowed_models"] = tuple(one.strip().lower() for one in known["allowed_models"])
    return known


def operator_key_fault(key: Any) -> str:
    """Why a text cannot be an operator's key, "" when it can.  Command Code's keys begin with
    user_; others are accepted, but for those that another vendor is known by."""
    key = key.strip() if isinstance(key, str) else ""
    kind = mistaken_key(key)
    return "holds no Command Code key but " + kind if kind else (
        "" if OPERATOR_KEY.fullmatch(key) else "must have an apiKey")


def own_names(row: Json) -> Json:
    """A row with the other spellings that commandcode-bridge takes under our names."""
    return {ROW_NAMES.get(name, name): row[name]        # ours come last and count
            for name in sorted(row, key=lambda name: name not in ROW_NAMES)}


def read_credential(row: Any, source: str, place: str) -> Tuple[RingKey, bool]:
    """One row: {"id", "apiKey", "weight", "enabled", "maxInFlight", "allowedModels"} or a key
    alone; and whether it is enabled.  Raises ProxyError `config`, never with the key in it."""
    row = {"apiKey": row} if isinstance(row, str) else row
    if not isinstance(row, dict):
        raise credential_fault(source, place, "must be an object or a key")
    row = own_names(row)
    key, name, fault = row.get("apiKey"), row.get("id", ""), operator_key_fault(row.get("apiKey"))
    if fault:
        raise credential_fault(source, place, fault + "; Command Code's keys begin with user_")
    if not isinstance(name, str) or KEY_LIKE.search(name):
        raise credential_fault(source, place, "must have an id that is a name")
    known = credential_members(row, source, place)
    enabled = known.pop("enabled")
    return new_ring_key(key.strip(), name=printable(name, 64), **known), enabled


def decode_credentials(text: str, source: str) -> Any:
    """The JSON of a source.  Raises ProxyError `config` that quotes none of it."""
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise credential_fault(source, "is not JSON:", "%s at line %d, column %d" % (
            error.msg, error.lineno, error.colno)) from None
    except (ValueError, RecursionError):
        raise credential_fault(source, "is not usable", "JSON") from None


def credential_rows(text: str, source: str) -> List[Any]:
    """The rows in a source's text: JSON (a list, {"credentials": [...]} or the CLI's {"apiKey"})
    or keys as `user_a,home=user_b`.  Raises ProxyError `config`."""
    text = text.strip().lstrip("\ufeff")
    if not text.startswith(("[", "{")):
        pairs = [entry.rpartition("=") for entry in re.split(r"[,\n]", text) if entry.strip()]
        return [{"id": name.strip(), "apiKey": key.strip()} for name, _, key in pairs]
    value = decode_credentials(text, source)
    if isinstance(value, dict):
        alone = [value["apiKey"]] if value.get("apiKey") else []
        known = {"credentials", "apiKeys", "apiKey"} & set(value)
        if not known and re.search("user_[A-Za-z0-9]{16}", text):       # no user_name
            raise credential_fault(source, "holds a key, but not", 'in a list under "credentials"')
        value = value.get("credentials", value.get("apiKeys", alone))
    if not isinstance(value, list):
        raise credential_fault(source, "must hold", "a list of credentials")
    return value


def every_credential(rows: List[Any], source: str) -> List[Tuple[RingKey, bool]]:
    """The keys of all rows, and whether each is enabled.  Raises ProxyError `config`."""
    if len(rows) > MAX_OPERATOR_KEYS:
        raise credential_fault(source, "holds", "more than %d keys" % MAX_OPERATOR_KEYS)
    return [read_credential(row, source, "credential %d" % number)
            for number, row in enumerate(rows, 1)]


def read_credentials(sources: Iterable[Tuple[str, str]]) -> Tuple[str, Tuple[RingKey, ...]]:
    """(source, keys) of the first of (name, text) that holds a key; ("", ()) for none.

    Raises ProxyError `config` that names source and row, never a key.
    """
    for source, text in sources:
        keys = every_credential(credential_rows(text, source), source)
        if keys:        # rows that are all switched off are the operator's word too
            return source, merge_ring([key for key, on in keys if on], source, "config")
    return "", ()


def check_operator(operator: Operator, host: str) -> str:
    """What the start-up screen says of operator keys that lie unused, "" for nothing.

    Raises ProxyError `config` where anybody on the net could spend them.
    """
    if KEY_PATTERN.search(operator.client_key):
        raise ProxyError("config", "clientKey looks like a Command Code key (user_...): choose "
                         "another, or callers' requests would be taken for ones with own keys",
                         param="clientKey")
    if not re.fullmatch("[!-~]*", operator.client_key):
        raise ProxyError("config", "clientKey must be of visible ASCII characters: a header holds "
                         "no others", param="clientKey")
    if not operator.keys or operator.client_key:
        return ""
    if not LOOPBACK.fullmatch(host):
        raise ProxyError("config", "%s holds keys, and host %s is reachable from other machines: "
                         "set clientKey (BRIDGE_API_KEY) for callers to present, or unset the keys"
                         % (operator.source, host), param="clientKey")
    return "" if operator.loopback else (
        "the keys of %s are unused: set clientKey, or operatorKeys: loopback" % operator.source)


def odd_key_warnings(operator: Operator) -> List[str]:
    """A warning that names the keys that are not like Command Code's."""
    odd = [key.name or key.shown for key in operator.keys if not key.key.startswith("user_")]
    return ["%s: Command Code's keys begin with user_, not so: %s" % (
        operator.source, ", ".join(odd[:8]) + ", ..." * (len(odd) > 8))] if odd else []


def presents_client_key(fields: Fields, client_key: str,
                        notes: Optional[List[str]] = None) -> bool:
    """Whether a header holds this key.  With `notes` it may stand in a list, as a caller's own key
    may; they tell of the other entries."""
    for name, where in KEY_FIELDS:
        text = key_text(fields, name)
        entries = [] if notes is None else ring_entries(text)[:MAX_RING_KEYS]
        found = [is_same_secret(one, client_key) for one in (text, *entries)]
        if notes is not None and any(found) and not found[0]:
            note_left_out(entries, where, client_key, notes)
        if any(found):
            return True
    return False


def loopback_fault(fields: Fields, peer: str, method: str) -> str:
    """Why a request does not count as one of this machine's own user, "" when it does.

    A web page can make a browser send requests here: its Origin, its host name (DNS rebinding)
    and the content types that it may send unasked give it away.
    """
    host = re.sub(r":[0-9]*$", "", fields.get("host", ""))
    origin = fields.get("origin", "")
    media = fields.get("content-type", "").partition(";")[0].strip().lower()
    faults = (
        (not LOOPBACK.fullmatch(peer) or any(map(FORWARDED.fullmatch, fields)),
         "it comes from another machine"),
        (not LOOPBACK.fullmatch(host), "its Host is not this machine"),
        (bool(origin) and origin.lower() != "http://" + fields.get("host", "").lower(),
         "its Origin is foreign"),
        (fields.get("sec-fetch-site", "none") not in ("none", "same-origin"),
         "a page of another site sends it"),
        (method == "POST" and media != "application/json",
         "its Content-Type is not application/json"))
    return next((words for fault, words in faults if fault), "")


def find_caller(fields: Fields, operator: Operator, peer: str, method: str) -> Caller:
    """Whose request it is.  Raises ProxyError 400 for a malformed ring, 401 without a key that
    counts, 403 where operatorKeys: loopback does not hold for this request."""
    notes: List[str] = []
    own = ring_in(fields, notes, operator.client_key)
    if own:
        if PLACEHOLDER.fullmatch(own[0].key):
            raise missing_key(fields, bool(operator.client_key))
        return Caller(own, own[0].digest, False, tuple(notes))
    if operator.client_key and presents_client_key(fields, operator.client_key, notes):
        if not operator.keys:
            raise ProxyError("authentication", "The clientKey is right, but the proxy's operator "
                             "has set no keys (credentialsFile): " + OWN_KEY)
        name = hashlib.sha256(b"client\n" + operator.client_key.encode()).hexdigest()
        return Caller(operator.keys, name, True, tuple(notes))
    if operator.keys and operator.loopback and not operator.client_key:
        fault = loopback_fault(fields, peer, method)
        if fault:
            raise ProxyError("permission", "The operator's keys are not for this request: %s "
                             "(operatorKeys: loopback). Send your own key." % fault)
        return Caller(operator.keys, hashlib.sha256(b"loopback").hexdigest(), True)
    raise missing_key(fields, bool(operator.client_key))


# === OPERATOR KEY CHANGES (pure) ============================================
# The text of the operator's file with a key added, changed or taken out.  What
# else stands in the file stays, in whichever of its forms it is written; a form
# without room for more becomes {"credentials": [...]}.  A row is meant by its id,
# or by its key's safe name.

KEY_CHANGES = ("id", "weight", "enabled", "maxInFlight", "allowedModels")


def open_credentials(text: str, source: str) -> Tuple[Any, List[Any]]:
    """(the whole value, the list of rows in it) of a credentials file, the list to be changed in
    its place.  Raises ProxyError `config`."""
    text = text.strip().lstrip("\ufeff")
    rows = credential_rows(text, source) if text else []
    if not text.startswith(("[", "{")):
        return {"credentials": rows}, rows
    value = decode_credentials(text, source)
    if isinstance(value, list):
        return value, value
    name = "credentials" if "credentials" in value or "apiKeys" not in value else "apiKeys"
    value.setdefault(name, rows)
    if value[name] is rows:
        value.pop("apiKey", None)           # it is one of the rows now
    return value, value[name]


def id_of(key: RingKey) -> str:
    """What a key is called where it is changed."""
    return key.name or key.shown


def check_key_id(given: Any) -> str:
    """An id for a key.  Raises ProxyError `invalid`."""
    if not isinstance(given, str) or not re.fullmatch(r"[!-~]([ -~]{0,62}[!-~])?", given) or \
            KEY_LIKE.search(given) or given.startswith("key:") or given in (".", ".."):
        raise ProxyError("invalid", "id must be a name of 1 to 64 printable ASCII characters that "
                         "looks neither like a key nor like a way in a path.", param="id")
    return given


def check_key_changes(body: Json) -> Json:
    """What may be changed of a key; null stands for the default.  Raises ProxyError `invalid`."""
    unknown = [name for name in body if name not in KEY_CHANGES]
    if unknown:
        raise ProxyError("invalid", "%s is no member that can be set here (%s)." % (
            printable(unknown[0], 64), ", ".join(KEY_CHANGES)), param=printable(unknown[0], 64))
    for _, name, _, fits, words in CREDENTIAL_MEMBERS:
        if body.get(name) is not None and not fits(body[name]):
            raise ProxyError("invalid", "%s must be %s." % (name, words), param=name)
    if "id" in body:
        check_key_id(body["id"])
    return body


def find_row(rows: List[Any], name: str, source: str) -> int:
    """Which row is meant.  Raises ProxyError 404."""
    keys = [key for key, _ in every_credential(rows, source)]
    for names in ([id_of(key) for key in keys], [key.shown for key in keys]):
        if name in names:
            return names.index(name)
    raise ProxyError("not_found", "There is no key %s in credentialsFile." % printable(name, 64))


def refuse_taken(rows: List[Any], name: Any, index: int, source: str) -> None:
    """Refuse an id that another row has (409)."""
    for number, (key, _) in enumerate(every_credential(rows, source)):
        if number != index and name in (id_of(key), key.shown):
            raise ProxyError("invalid", "There is a key %s already." % printable(name, 64),
                             param="id", status=409)


def add_credential(rows: List[Any], body: Json, source: str) -> str:
    """Put a new key behind the others; its id.  Raises ProxyError 400, 409."""
    given = body.get("apiKey")
    if operator_key_fault(given):
        raise ProxyError("invalid", "apiKey must be a Command Code key (user_...).",
                         param="apiKey")
    check_key_changes({name: value for name, value in body.items() if name != "apiKey"})
    name = check_key_id(body.get("id"))
    refuse_taken(rows, name, -1, source)
    key = new_ring_key(given.strip())
    if key.digest in [one.digest for one, _ in every_credential(rows, source)]:
        raise ProxyError("invalid", "The key %s is there already." % key.shown, param="apiKey",
                         status=409)
    if len(rows) >= MAX_OPERATOR_KEYS:
        raise ProxyError("invalid", "There can be %d keys at most." % MAX_OPERATOR_KEYS,
                         status=409)
    rows.append({"id": name, "apiKey": key.key, **{
        name: value for name, value in body.items()
        if name not in ("id", "apiKey") and value is not None}})
    return name


def change_credential(rows: List[Any], name: str, body: Json, source: str) -> str:
    """Change members of a key's row; its id from then on.  Raises ProxyError 400, 404, 409."""
    index = find_row(rows, name, source)
    check_key_changes(body)
    if "id" in body:
        refuse_taken(rows, body["id"], index, source)
    row = {"apiKey": rows[index]} if isinstance(rows[index], str) else own_names(rows[index])
    row.update(body)
    rows[index] = {name: value for name, value in row.items()
                   if value is not None or name not in KEY_CHANGES}
    return id_of(read_credential(rows[index], source, "")[0])


def remove_credential(rows: List[Any], name: str, source: str) -> str:
    """Take a key's row out; its id.  Raises ProxyError 404."""
    index = find_row(rows, name, source)
    return id_of(read_credential(rows.pop(index), source, "")[0])


# === OTHER BRIDGES (pure) ===================================================
# What people bring along from another bridge: the rest of commandcode-bridge's
# credentials file, which counts below the config file; variables that are not
# read here, each with what does its work; and `.env` files.

MAX_WARNINGS = 8        # about one file
FILE_MEMBERS = {
    "server.host": "host", "server.port": "port", "routing.policy": "routingPolicy",
    "routing.fallbackPolicy": "fallbackPolicy", "bridgeApiKey": "clientKey", "models": "models",
    "routing.maxInFlightPerCredential": "maxInFlightPerKey",
    "routing.maxTotalInFlight": "maxTotalInFlight",
    "routing.billingRefreshMs": "accountRefreshSeconds",
    "routing.credentialCooldownMs": "keyCooldownSeconds"}
READ_ELSEWHERE = re.compile(        # or not ours to read: the CLI's names, a page's texts
    r"apiKey|userId|userName|(credentials|apiKeys)(\.(id|apiKey|%s))?|models\.(id|enabled|label|"
    r"provider|family|aliases|notes|contextWindow)" % "|".join(
        [*ROW_NAMES, *(row[1] for row in CREDENTIAL_MEMBERS)]))
OTHER_VARIABLES = (     # a pattern of names, and what to do instead
    ("COMMANDCODE_ROUTER_.*", "put HAProxy or nginx in front (README, Several processes or hosts)"),
    ("BRIDGE_ENV_FILE", "use --env-file FILE"), ("BRIDGE_BASE_URL", "use doctor --generate --url"),
    ("PROXY_API_KEY", "set clientKey (BRIDGE_API_KEY)"), ("CC_MAX_BODY_MB", "set maxBodyBytes"),
    ("CC_API_KEY|CMD_API_KEY|COMMAND_CODE_API_KEY", "set COMMANDCODE_API_KEY"),
    ("COMMANDCODE_VERSION", "set cliVersion (COMMANDCODE_CLI_VERSION)"),
    ("ROTATION_MODE|CC_KEY_SELECTION_STRATEGY", "set routingPolicy"),
    ("CC_STREAM_IDLE_MS|CC_NONSTREAM_IDLE_MS", "set upstreamIdleSeconds"),
    ("CC_MAX_INFLIGHT", "set maxTotalInFlight"), ("CMD_ZDR", "the header x-cmd-zdr is never sent"),
    ("CC_UPSTREAM_PROXY", "set HTTPS_PROXY"), ("CORS_ALLOW_ORIGIN", "set corsOrigin (CORS_ORIGIN)"))
ENV_LINE = re.compile(r"""(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=(?:\s*'([^']*)'|\s*"((?:"""
                      r"""[^"\\]|\\.)*)"|(?!\s*['"])([^\0]*?))(?:\s+#.*|\s*)""")


def other_variables(environment: Mapping[str, str]) -> Dict[str, List[str]]:
    """The variables of OTHER_VARIABLES that are set, under the warning about them."""
    found = [(instead, sorted(name for name in environment if environment[name]
                              and re.fullmatch(pattern, name)))
             for pattern, instead in OTHER_VARIABLES]
    return {"environment %s%s: not read here; %s" % (
        ", ".join(names[:4]), ", ..." * (len(names) > 4), instead): names
            for instead, names in found if names}


def row_members(name: str, row: Any) -> List[Tuple[str, Any]]:
    """(path, value) of what a row of a credentials file holds; also a model's switch whole."""
    inside = row if isinstance(row, dict) else {}
    switch: Json = {"id": inside.get("id"), "enabled": inside.get("enabled")}
    whole = [(name, switch)] if name == "models" else [(name, row)] * (row is not inside)
    return whole + [("%s.%s" % (name, part), given) for part, given in inside.items()]


def file_members(value: Json) -> List[Tuple[str, Any]]:
    """The same of a whole file, without what is read elsewhere and what is null."""
    rows = [(name, row) for name, inner in value.items() if inner is not None
            for row in (inner if isinstance(inner, list) else [inner])]
    return [member for name, row in rows for member in row_members(name, row)
            if member[1] is not None and not READ_ELSEWHERE.fullmatch(member[0])]


def read_file_member(name: str, given: Any, source: str) -> Tuple[str, Any]:
    """(option, value) of a member.  Raises ProxyError `config`, also for one that is unknown."""
    if name not in FILE_MEMBERS:
        raise credential_fault(source, printable(name, 64), {
            "routing.maxTotalInFlightMultiplier": "is not used (set maxTotalInFlight)"}.get(
                name, "is not understood"))
    option = next(option for option in OPTIONS if option.name == FILE_MEMBERS[name])
    if name == "models":
        given = [given]
    elif name.endswith("Ms") and is_number(given, int, float) and 0 <= given < 1e15:
        given = given / 1000
    return option.name, read_value(option._replace(name=name), given, source)


def file_entries(text: str, source: str) -> Tuple[Json, List[str]]:
    """(options, warnings) of what a credentials file holds besides its keys.  What is not
    understood is named and passed over.  Raises ProxyError `config` for what is not JSON."""
    text = text.strip().lstrip("\ufeff")
    value = decode_credentials(text, source) if text.startswith("{") else {}
    entries: Json = {}
    switches: Json = {}                 # the last of a model counts
    problems: Dict[str, None] = {}      # each once
    for name, given in file_members(value):
        try:
            option, entries[option] = read_file_member(name, given, source)
            switches.update({row["id"].lower(): row for row in entries.get("models", ())})
        except ProxyError as error:
            problems[redact(error.message) + "; it does not count"] = None
    entries.update({"models": list(switches.values())} if switches else {})
    more = len(problems) - MAX_WARNINGS
    return entries, [*list(problems)[:MAX_WARNINGS],
                     *["%s: %d more like these" % (source, more)] * (more > 0)]


def parse_env_file(text: str, source: str) -> Dict[str, str]:
    """The variables of a `.env` file: NAME=value with or without `export`, quotes and comments.
    Raises ProxyError `config` that names the line and shows nothing of it."""
    found: Dict[str, str] = {}
    for number, line in enumerate(map(str.strip, text.lstrip("\ufeff").split("\n")), 1):
        parts = ENV_LINE.fullmatch(line)
        if parts is not None:
            name, plain, escaped, bare = parts.groups()
            found[name] = (plain or "") + (bare or "").strip() + re.sub(r'\\([nrt"\\$])', (
                lambda one: {"n": "\n", "r": "\r", "t": "\t"}.get(one[1], one[1])), escaped or "")
        elif line and not line.startswith("#"):
            raise ProxyError("config", "%s, line %d: must be NAME=value; a value in quotes ends on "
                             "its line" % (source, number))
    return found


# === VENDORS (pure) =========================================================
# What answers besides Command Code: vendors' own APIs and any address that
# speaks one of them, a row each.  A model id `[bridge/]<backend>/<model>` names
# one that is on, and the part behind it is sent; an id whose first part is no
# such name goes the ordinary way.  A vendor's key is the operator's and goes to
# that vendor alone.

OWN_APIS: Dict[str, UpstreamFormat] = {     # as vendors speak them: no plans, no address of ours
    "openai": OPENAI._replace(path="/chat/completions", read_failure=read_upstream_failure,
                              needs_limit=False),
    "anthropic": ANTHROPIC._replace(path="/messages", read_failure=read_upstream_failure,
                                    key_field="x-api-key")}


@dataclass(frozen=True)
class Vendor:
    """One vendor's API: `base` ends with the version, `models` are what lists show."""

    name: str
    base: str
    api: UpstreamFormat
    key: str = field(default="", repr=False)
    models: Tuple[str, ...] = ()


def check_base(vendor: Vendor, insecure: bool) -> None:
    """Raise ProxyError `config` for an address that is none, or that shows the key to a network."""
    try:
        origin = parse_origin(vendor.base)
    except ValueError as error:
        raise ProxyError("config", "vendorBases: %s %s" % (vendor.name, error),
                         param="vendorBases") from None
    if origin.scheme == "http" and not insecure and not LOOPBACK.fullmatch(origin.host):
        raise ProxyError("config", "%s: plain http would show its key to the network; use https, "
                         "or a row of vendors with insecure: true" % vendor.name, param="vendors")


def known_vendors(config: Config, environment: Mapping[str, str]) -> Dict[str, Vendor]:
    """Every vendor that can be switched on, by name.  Raises ProxyError `config`."""
    strange = sorted(set(config.vendor_bases) - set(VENDORS))
    if strange:
        raise ProxyError("config", "vendorBases names no vendor: %s (there are %s; others belong "
                         "into vendors)" % (json.dumps(strange[0][:40]), ", ".join(VENDORS)),
                         param="vendorBases")
    known = {name: Vendor(name, config.vendor_bases.get(name, base), OWN_APIS[api],
                          getattr(config, name + "_key"))
             for name, (base, api) in VENDORS.items()}
    for name, row in config.vendors.items():
        key = row.get("key") or environment.get(row.get("keyEnv", ""), "")
        known[name] = Vendor(name, row["base"], OWN_APIS[row["format"]], key,
                             tuple(row.get("models", ())))
    for vendor in known.values():
        check_base(vendor, config.vendors.get(vendor.name, {}).get("insecure", False))
    return known


def vendors_on(config: Config, environment: Mapping[str, str]) -> Tuple[Vendor, ...]:
    """The vendors that `backends` switches on, in its order.  Raises ProxyError `config`, also
    where anybody on the net could spend their keys."""
    known = known_vendors(config, environment)
    names: List[str] = []
    for word in map(str.lower, config.backends):
        if word != "passthrough" and word not in known:
            raise ProxyError("config", "backends: %s is none of passthrough, %s" % (
                json.dumps(word[:40]), ", ".join(known)), param="backends")
        names += [word] if word in known else [name for name in VENDORS if known[name].key]
    if names and not config.client_key and not LOOPBACK.fullmatch(config.host):
        raise ProxyError("config", "backends are on, and host %s is reachable from other machines: "
                         "whoever reaches it could spend their keys. Set clientKey "
                         "(BRIDGE_API_KEY, BRIDGE_BEARER) for callers to present" % config.host,
                         param="clientKey")
    for name in names:
        if not re.fullmatch("[!-~]*", known[name].key):
            raise ProxyError("config", "backends: %s: its key must be of visible ASCII characters"
                             % name, param="backends")
    return tuple(known[name] for name in dict.fromkeys(names))


def vendor_warnings(vendors: Iterable[Vendor], models: Models) -> List[str]:
    """What is to be said at start: of vendors without a key, and of ids that they take over."""
    told = []
    for vendor in vendors:
        taken = sum(name.startswith(vendor.name + "/") for name in models.known)
        if taken:
            told.append("backends: %s answers %s of Command Code's list now (commandcode/%s/... "
                        "still means Command Code's)" % (vendor.name, counted(taken, "id"),
                                                         vendor.name))
        if not vendor.key:
            told.append("backends: %s has no key, so its requests fail" % vendor.name)
    return told


def split_backend(name: str, on: Collection[str]) -> Tuple[str, str]:
    """(backend, its own model id) of a model id that is no alias any more; the backend is "" where
    none is named.  Raises ProxyError 400 and 404."""
    plain = BRIDGE.sub("", name)
    first, _, model = plain.partition("/")
    first = first.lower()
    if first == "commandcode" and model:
        return "", model
    if first not in on:
        if plain != name:
            raise ProxyError("model", "There is no backend %s here (the option backends switches "
                             "backends on)." % printable(first, 40), param="model")
        return "", name
    if not MODEL_PART.fullmatch(model):
        raise wrong("model", "must be %s/ and a model of it, of letters, digits and . _ : @ / + ~ "
                    "[ ] -, at most 200 of them" % first)
    return first, model


def vendor_model(name: str, model: str, config: Config, models: Models) -> Model:
    """A vendor's model; `name` is its whole id.  Raises ProxyError 404 where it is not allowed."""
    refuse_switched_off(name, models, config)
    named = {BRIDGE.sub("", aliased(one, config).lower()) for one in config.allowed_models}
    if named and name.lower() not in named:
        raise not_allowed(name, config)
    return Model(model, name)


def admit_borrower(fields: Fields, operator: Operator, peer: str, method: str) -> None:
    """Let nobody use a vendor's key but those who may use the operator's.  Raises ProxyError 401
    without the clientKey, 403 where there is none and it is not this machine's own user."""
    if operator.client_key:
        if not presents_client_key(fields, operator.client_key, []):    # alone or in a list
            raise missing_key(fields, True)
        return
    fault = loopback_fault(fields, peer, method)
    if fault:
        raise ProxyError("permission", "The vendors' keys are not for this request: %s." % fault)


# === ACCOUNT FIGURES (pure) =================================================
# What an account has left, as the upstream's billing answers tell it (UPSTREAM
# 2.1 to 2.3), and what follows from it: burn, score, windows.  The answers are
# nobody's promise: whatever is missing or of another type counts as not told.

DAY_SECONDS = 86_400.0
MIN_DAYS = 0.25             # to the period's end: the last hours must not score without bound
UNKNOWN_DAYS = 30.0         # where no end is told
RESERVE_DAYS = 365.0        # purchased credits are good for about a year
MAX_RESET_SECONDS = 32 * DAY_SECONDS    # a window's reset later than this is a mistake
STALE_SECONDS = 3600.0      # figures older than this are not known any more
ISO_MOMENT = re.compile(
    r"([0-9-]{10})[T ]([0-9:]{8})(?:\.[0-9]+)?(?:Z|([+-][0-9]{2}):?([0-9]{2}))?")
ACCOUNT_PATHS = ("/alpha/whoami", "/alpha/billing/credits", "/alpha/billing/subscriptions")


class Window(NamedTuple):
    """A usage window in USD; `resets` is an epoch second, 0 when not told."""

    used: float
    cap: float
    exceeded: bool
    resets: float = 0.0


class Figures(NamedTuple):
    """An account at epoch second `at`; None is not told."""

    at: float
    monthly: Optional[float] = None         # USD left, as are the next two
    free: Optional[float] = None
    purchased: Optional[float] = None
    plan: str = ""
    status: str = ""
    period_end: Optional[float] = None      # epoch second
    five_hour: Optional[Window] = None
    weekly: Optional[Window] = None

    @property
    def known(self) -> bool:
        return (self.monthly, self.free, self.purchased) != (None, None, None)

    @property
    def expiring(self) -> float:
        return max(self.monthly or 0.0, 0.0) + max(self.free or 0.0, 0.0)

    @property
    def balance(self) -> float:
        return self.expiring + max(self.purchased or 0.0, 0.0)


def read_amount(value: Any) -> Optional[float]:
    """A number, also one written as a string; None for anything else."""
    if isinstance(value, str) and re.fullmatch(
            r"-?[0-9]{1,15}(\.[0-9]{1,20})?([eE]-?[0-9]{1,2})?", value, re.ASCII):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e15 < value < 1e15:
        return None
    return float(value)


def read_iso(text: str) -> float:
    """The epoch second of ISO 8601, UTC where no zone is told; 0.0 for anything else."""
    found = ISO_MOMENT.fullmatch(text.strip())
    if found is None:
        return 0.0
    from datetime import datetime       # rarely wanted, so not at start
    try:
        return datetime.fromisoformat("%sT%s%s:%s" % (
            found[1], found[2], found[3] or "+00", found[4] or "00")).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def read_moment(value: Any) -> Optional[float]:
    """An epoch second from seconds, milliseconds (by their size) or ISO 8601; None for none."""
    moment = read_iso(value) if isinstance(value, str) else read_amount(value) or 0.0
    if moment <= 0:
        return None
    return moment / 1000 if moment > 1e11 else moment


def read_window(given: Any, now: float) -> Optional[Window]:
    """One of windowLimits' members; None when it limits nothing."""
    if not isinstance(given, dict):
        return None
    used, cap = read_amount(given.get("used")) or 0.0, read_amount(given.get("cap")) or 0.0
    resets = read_moment(given.get("resetAt")) or 0.0
    if resets > now + MAX_RESET_SECONDS:
        resets = 0.0
    exceeded = given.get("exceeded") is True or used >= cap > 0
    return Window(used, cap, exceeded, resets) if cap > 0 or exceeded else None


def inner_object(value: Any, name: str) -> Json:
    """An object's member that is an object, also one level down in `data`; {} for none."""
    for place in (value, value.get("data") if isinstance(value, dict) else None):
        if isinstance(place, dict) and isinstance(place.get(name), dict):
            return place[name]
    return {}


def read_org(whoami: Any) -> str:
    """The organisation's id for ?orgId=; "" where the key belongs to a person."""
    name = inner_object(whoami, "org").get("id")
    return name if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name) else ""


def read_figures(billing: Any, subscription: Any, now: float) -> Optional[Figures]:
    """An account by its answers of /billing/credits and /billing/subscriptions; either may be
    None or anything.  None when they tell nothing."""
    credits, limits = inner_object(billing, "credits"), inner_object(billing, "windowLimits")
    plan = inner_object(subscription, "data")
    if limits.get("limited") is False:
        limits = {}
    figures = Figures(
        now, *(read_amount(credits.get(name))
               for name in ("monthlyCredits", "freeCredits", "purchasedCredits")),
        plan=printable(str(plan.get("planId") or ""), 40),
        status=printable(str(plan.get("status") or ""), 20),
        period_end=read_moment(plan.get("currentPeriodEnd")),
        five_hour=read_window(limits.get("fiveHour"), now),
        weekly=read_window(limits.get("weekly"), now))
    return figures if figures != Figures(now) else None


def days_left(figures: Figures, now: float) -> Optional[float]:
    """Days to the period's end; None where no end is told, or where the period is over."""
    left = (figures.period_end or 0.0) - now
    return left / DAY_SECONDS if left > 0 else None


def fresh_figures(figures: Optional[Figures], now: float) -> Figures:
    """An account's figures; ones that tell nothing for none, or only old ones (`at` is 0 then)."""
    known = figures or Figures(now)
    return known if now - known.at <= STALE_SECONDS else Figures(0.0)


def balance_of(figures: Figures, now: float) -> Optional[float]:
    return figures.balance if figures.known else None


def burn_of(figures: Figures, now: float) -> Optional[float]:
    """USD a day that must be spent, or expiring credit is lost; a purchased reserve's share of a
    year where that is all there is.  None: not known, for no credit is told, or the period is over
    and the next period's figures have yet to come."""
    end, expiring = figures.period_end, figures.expiring
    ended = end is not None and end <= now and (expiring > 0 or figures.at < end)
    if ended or not figures.known:
        return None
    if expiring > 0:
        return expiring / max(days_left(figures, now) or UNKNOWN_DAYS, MIN_DAYS)
    return figures.balance / RESERVE_DAYS


# === KEY STATE (pure) =======================================================
# What is known of each key, under its whole SHA-256: why it is passed over and
# until when, its account's figures, what went through.  It is shared by all
# callers that hold the key, and so says nothing of any of them.  Every table is
# bounded; the least recently used goes first.  Times are epoch seconds, for the
# upstream's resets are.  `account_state` alone says how an account is: routing,
# reports, alerts and the doctor ask it.

MAX_KEYS = 4096             # about 1 KiB each
MAX_KEY_MODELS = 32         # that a key is remembered not to serve
MAX_CONVERSATIONS = 8192    # whose key is remembered
MAX_RINGS = 1024            # whose turns are remembered
KEY_IDLE_SECONDS = 24 * 3600.0
PLAN_SECONDS = 3600.0       # a plan may be upgraded: asked again after this
NEVER_ENDS = float("inf")

# Reasons for passing a key over, in the words that a person reads.
UNFIT_WORDS = {"refused": "the upstream refused it", "credit": "it is out of credit",
           "window": "it is over its usage window", "cooldown": "it is in cooldown",
           "model": "its plan or account lacks this model",
           "allowed": "its allowedModels lack this model"}
REASON_OF_KIND = {
    "authentication": "refused", "billing": "credit", "usage_window": "window", "plan": "model",
    "permission": "model", "rate_limit": "cooldown", "timeout": "cooldown", "late": "cooldown",
    "unavailable": "cooldown", "overloaded": "cooldown", "upstream": "cooldown"}


class Routing(NamedTuple):
    """How a key is chosen for one request: what is wanted, and the options; seconds."""

    model: str = ""             # "": no model in particular
    upstream: str = ""
    policy: str = "daily_burn_priority"
    fallback: str = "round_robin"
    max_in_flight: int = 0      # 0: RING_IN_FLIGHT for rings, no limit for a single key
    cooldown: float = 60.0
    refresh: float = 300.0
    names: FrozenSet[str] = frozenset()     # other names of `model` in the keys' allowedModels


class Mark(NamedTuple):
    """Why a key is passed over: a reason, the kind of failure that it answers to, and its end."""

    reason: str
    kind: str
    until: float
    since: float = 0.0


class AccountState(NamedTuple):
    """How an account is now, in one word: `usable`, `refused` (its key), `skipped`, or `unknown`
    where the upstream has not accepted its key yet.  Routing may choose it where `reason` is ""."""

    word: str
    reason: str = ""            # one of UNFIT_WORDS
    kind: str = ""              # of the failure that it answers to
    until: float = 0.0          # NEVER_ENDS: until something new is known


USABLE, DENIED, UNKNOWN = map(AccountState, ("usable", "refused", "unknown"))


@dataclass(eq=False, **SLOTS)
class KeyState:
    """What is known of one key."""

    used: float = 0.0
    in_flight: int = 0
    marks: Dict[str, Mark] = field(default_factory=dict)    # by reason, or route of a model
    figures: Optional[Figures] = None
    asked: float = 0.0                                      # when figures were last asked for
    unreached: bool = False                                 # and no connection could be made
    accepted: float = 0.0                                   # when the upstream last took the key
    denied: float = 0.0     # since when account questions alone are answered with 401; 0.0: not
    requests: int = 0
    failures: int = 0
    input: int = 0
    output: int = 0
    cached: int = 0
    cost: float = 0.0


@dataclass(eq=False)
class KeyTable:
    """All keys that are known, whose conversations are where, and each ring's turns."""

    states: Dict[str, KeyState] = field(default_factory=dict)
    conversations: Dict[str, str] = field(default_factory=dict)     # to digests
    turns: Dict[str, Dict[str, float]] = field(default_factory=dict)


def keep_newest(table: Dict[str, Any], name: str, value: Any, most: int) -> None:
    """Put an entry last; the first ones make room."""
    table.pop(name, None)
    table[name] = value
    while len(table) > most:
        del table[next(iter(table))]


def state_of(table: KeyTable, key: RingKey, now: float) -> KeyState:
    """A key's state, a new one where it is not known; keys long unused are forgotten."""
    while table.states:
        oldest = next(iter(table.states))
        if now - table.states[oldest].used <= KEY_IDLE_SECONDS:
            break
        del table.states[oldest]
    state = table.states.get(key.digest) or KeyState()
    state.used = now
    keep_newest(table.states, key.digest, state, MAX_KEYS)
    return state


def model_route(routing: Routing) -> str:
    """Where a mark of one model is kept: what one upstream refuses, another may serve."""
    return "%s %s" % (routing.upstream, routing.model.lower())


def failure_reason(error: ProxyError) -> str:
    """What a failure says of the key that it came with; "" when it says nothing."""
    said = ("%s %s" % (error.code, error.message)).lower()
    if error.kind == "billing" and "premium_credits_exhausted" in said:
        return "model"          # other models may go on
    if error.kind == "permission" and "usage_exceeded" in said:
        return "credit"         # an organisation's spending cap
    if error.status >= 500 and error.kind != "late" and not error.retryable:
        return ""               # the upstream says that repeating is no use, with any key
    return REASON_OF_KIND.get(error.kind, "")


def is_replaceable(error: ProxyError) -> bool:
    """Whether another key may do better.  A silent upstream is not asked again: the first call
    may still run, and be paid for."""
    return error.kind != "late" and (error.retryable or failure_reason(error) != "")


def full_windows(figures: Optional[Figures]) -> List[Window]:
    windows = (figures.five_hour, figures.weekly) if figures else ()
    return [window for window in windows if window is not None and window.exceeded]


def mark_span(reason: str, error: ProxyError, state: KeyState, routing: Routing,
              now: float) -> float:
    """For how many seconds a failure keeps its key from being chosen."""
    told, longer = error.retry_after, max(routing.refresh, routing.cooldown)
    reset = max([0.0, *(one.resets for one in full_windows(state.figures))]) - now     # the last
    spans = {"refused": NEVER_ENDS, "credit": max(longer, told or 0.0),
             "window": told or (reset if reset > 0 else longer),
             "model": PLAN_SECONDS if error.kind == "plan" else longer,
             "cooldown": routing.cooldown if told is None else told}
    return spans[reason]


def note_failure(state: KeyState, error: ProxyError, routing: Routing, now: float) -> None:
    """Remember what a failure says of its key.  A client that leaves is no failure at all."""
    reason = failure_reason(error)
    if not reason:
        return
    if reason in ("credit", "window", "model"):
        state.accepted = max(state.accepted, now)       # of a key that is not known it says 401
    place = model_route(routing) if reason == "model" else reason
    mark = Mark(reason, error.kind, now + mark_span(reason, error, state, routing, now), now)
    state.marks.pop(place, None)
    state.marks[place] = mark
    models = [one for one in state.marks if one not in UNFIT_WORDS]
    if len(models) > MAX_KEY_MODELS:
        del state.marks[models[0]]


def note_success(state: KeyState, began: float, now: float) -> None:
    """Remember that a call which began then was answered: its key is neither refused nor resting.
    An account question that was denied before was wrong, and so is the next one."""
    state.accepted = max(now, state.denied)
    for reason in ("refused", "cooldown") if state.marks else ():
        if reason in state.marks and state.marks[reason].since <= began:
            del state.marks[reason]


def note_key_check(state: KeyState, status: int, now: float) -> None:
    """Remember what /alpha/whoami said of a key: 401 is that of a key which is not valid.  Routing
    goes on with it, for side calls keep no key from being chosen."""
    if status == 200:
        state.accepted, state.denied = now, 0.0
    elif status == 401:
        state.denied = state.denied or now


def note_figures(state: KeyState, figures: Figures) -> None:
    """Take new figures: an account that answers is not refused, another plan has other models."""
    old, state.figures = state.figures, figures
    if "refused" in state.marks and state.marks["refused"].since <= state.asked:
        del state.marks["refused"]
    if old is not None and old.plan != figures.plan:
        state.marks = {place: mark for place, mark in state.marks.items() if place in UNFIT_WORDS}


def add_cost(one: Optional[str], other: Optional[str]) -> Optional[str]:
    """Two costs in USD as one; None where neither was told."""
    known = [amount for amount in map(read_amount, (one, other)) if amount is not None]
    return "%.10g" % sum(known) if known else None


def note_usage(state: KeyState, usage: Optional[Usage], cost: Optional[str]) -> None:
    if usage is not None:
        state.input += usage.input
        state.output += usage.output
        state.cached += usage.cache_read or 0
    state.cost += max(read_amount(cost) or 0.0, 0.0)


def is_allowed(key: RingKey, routing: Routing) -> bool:
    """Whether a key's allowedModels, if any, name the model of the request."""
    return not key.allowed_models or routing.model.lower() in key.allowed_models or \
        not routing.names.isdisjoint(key.allowed_models)


def account_state(key: RingKey, state: KeyState, routing: Routing, now: float) -> AccountState:
    """How a key's account is now, for the model of `routing` or for none in particular; of several
    reasons for passing it over the one that holds longest."""
    marks = [mark for place, mark in state.marks.items()
             if place in UNFIT_WORDS or place == model_route(routing)]
    marks += [Mark("window", "usage_window", one.resets or state.figures.at + routing.refresh)
              for one in full_windows(state.figures)]       # until the reset, or read again
    if routing.model and not is_allowed(key, routing):
        marks.append(Mark("allowed", "model", NEVER_ENDS))
    marks = [mark for mark in marks if mark.until > now]
    if marks:
        mark = max(marks, key=lambda mark: mark.until)
        word = "refused" if mark.reason == "refused" else "skipped"
        return AccountState(word, mark.reason, mark.kind, mark.until)
    if state.denied > state.accepted:
        return DENIED
    return USABLE if state.accepted or state.figures else UNKNOWN


# === KEY ROUTING (pure) =====================================================
# Which key of a ring serves a request: the one that its conversation is with,
# while it is fit, else one by the policy.  A policy weighs the fit keys; those by
# figures give way to the fallback policy where figures are missing.  When no key
# is left, the most useful error is told.  Single keys are not routed: only the
# upstream itself refuses them.

RING_IN_FLIGHT = 4          # calls at once on a key of a ring, while another is free
POLICY_ALIASES = {"depletion_aware": "daily_burn_priority"}
POLICIES: Dict[str, Callable[[Figures, float], Optional[float]]] = {    # what they weigh keys by
    "daily_burn_priority": burn_of, "balance_priority": balance_of,
    "round_robin": lambda figures, now: 1.0, "drain_first": lambda figures, now: 1.0}
USEFULNESS = {429: 0, 500: 1, 402: 2, 403: 3, 401: 4}      # of statuses; 500 stands for all 5xx

Candidate = Tuple[RingKey, KeyState]


def choose_smooth(turns: Dict[str, float], keys: List[RingKey], scores: List[float]) -> RingKey:
    """Smooth weighted round robin: shares as the scores are, spread evenly; the ring's own order
    at a tie.  Scores count as shares of their sum, so that it does not matter how they grow."""
    total = sum(scores)
    shares = [score / total for score in scores] if total > 0 else [1 / len(keys)] * len(keys)
    for key, share in zip(keys, shares):
        turns[key.digest] = round(turns.get(key.digest, 0.0) + share, 9)
    chosen = max(keys, key=lambda key: turns[key.digest])
    turns[chosen.digest] = round(turns[chosen.digest] - 1, 9)
    return chosen


def parse_policy(given: str, default: str) -> str:
    """The policy of x-ccproxy-routing, else the option's.  Raises ProxyError 400."""
    name = given.strip().lower() or default
    name = POLICY_ALIASES.get(name, name)
    if name not in POLICIES:
        raise ProxyError("invalid", "x-ccproxy-routing must be one of: %s."
                         % ", ".join([*POLICIES, *POLICY_ALIASES]))
    return name


def fit_keys(table: KeyTable, keys: Iterable[RingKey], routing: Routing, now: float,
             tried: Iterable[str]) -> List[Candidate]:
    """The keys that may serve now, in the ring's order; `tried` ones had their chance."""
    known = [(key, state_of(table, key, now)) for key in keys]
    return [(key, state) for key, state in known
            if key.digest not in tried and not account_state(key, state, routing, now).reason]


def with_credit(fit: List[Candidate], now: float) -> List[Candidate]:
    """Those not known to be out of credit (after its period's end an account may have new
    credit); all, where all are: free models exist."""
    known = [(one, fresh_figures(one[1].figures, now)) for one in fit]
    return [one for one, figures in known
            if figures.balance > 0 or burn_of(figures, now) is None] or fit


def choose_by_policy(table: KeyTable, keys: Tuple[RingKey, ...], fit: List[Candidate],
                     routing: Routing, now: float) -> RingKey:
    """One of the fit keys by the policy, or by the fallback where figures are missing: the one
    that must spend the most a day gets the most, so that nothing expires; or the one that has the
    most left; or in turn by weight; or the ring's own order, each key until nothing is left."""
    fit = with_credit(fit, now)
    policy = routing.policy
    worth = [POLICIES[policy](fresh_figures(state.figures, now), now) for _, state in fit]
    if None in worth:
        policy, worth = routing.fallback, [1.0] * len(fit)
    choices = [key for key, _ in fit]
    if policy == "drain_first":
        return choices[0]
    scores = [share * key.weight for share, key in zip(worth, choices)]
    if policy == "balance_priority":
        return choices[scores.index(max(scores))]
    ring = hashlib.sha256(" ".join([policy, *(key.digest for key in keys)]).encode()).hexdigest()
    turns = table.turns.get(ring, {})
    keep_newest(table.turns, ring, turns, MAX_RINGS)
    return choose_smooth(turns, choices, scores)


def home_key(table: KeyTable, places: Iterable[str], fit: List[Candidate]) -> Optional[RingKey]:
    """The fit key that a conversation is with, its own place for this model first."""
    homes = [table.conversations.get(place) for place in places]
    return next((key for home in homes for key, _ in fit if key.digest == home), None)


def settle_conversation(table: KeyTable, keys: Iterable[RingKey], places: List[str],
                        routing: Routing, now: float, chosen: RingKey) -> None:
    """Remember that a conversation is with a key from now on; only this model's part of it where
    its old key is unfit for this model alone."""
    general = fit_keys(table, keys, routing._replace(model="", upstream=""), now, ())
    stays = home_key(table, places[1:], general) is not None
    table.conversations.pop(places[0], None)
    keep_newest(table.conversations, places[0 if stays else 1], chosen.digest, MAX_CONVERSATIONS)


def choose_key(table: KeyTable, keys: Tuple[RingKey, ...], conversation: str, routing: Routing,
               now: float, tried: Iterable[str] = ()) -> Optional[RingKey]:
    """The key of a ring that serves next, None when none is left.  A conversation moves for good
    when its key is not fit.  When that is so for this model alone, only this model moves; when its
    key is merely busy, only this request does."""
    fit = fit_keys(table, keys, routing, now, tried)
    if not fit:
        return None
    free = [(key, state) for key, state in fit if state.in_flight < (
        key.max_in_flight or routing.max_in_flight or RING_IN_FLIGHT)] or fit
    places = ["%s %s" % (conversation, model_route(routing)), conversation]
    home = home_key(table, places, fit)
    if any(key is home for key, _ in free):
        chosen = home
    else:
        chosen = choose_by_policy(table, keys, free, routing, now)
    if home is None:
        settle_conversation(table, keys, places, routing, now, chosen)
        return chosen
    for place in filter(table.conversations.__contains__, places):
        keep_newest(table.conversations, place, table.conversations[place], MAX_CONVERSATIONS)
    return chosen


def check_single(key: RingKey, state: KeyState, routing: Routing) -> None:
    """Refuse what options forbid a key alone, whatever is remembered.  Raises ProxyError."""
    if not is_allowed(key, routing):
        raise ProxyError("model", "Model %s is not allowed for this key."
                         % printable(routing.model, 100), param="model")
    most = key.max_in_flight or routing.max_in_flight       # 0: any number, as it is no ring
    if most and state.in_flight >= most:
        raise ProxyError("rate_limit", "Too many requests at once with %s (maxInFlightPerKey)."
                         % key.shown, retry_after=1)


def memory_errors(skipped: List[Tuple[RingKey, AccountState]], now: float) -> List[ProxyError]:
    """What is to be said of keys that were passed over, in words of our own: the upstream's may
    have been about another caller's request."""
    words = ["%s: %s%s" % (key.shown, UNFIT_WORDS[known.reason], "" if known.until == NEVER_ENDS
                           else " for %d s" % max(1, round(known.until - now)))
             for key, known in skipped[:5]]
    more = ["and %d more" % (len(skipped) - 5)] if len(skipped) > 5 else []
    text = "No key of the ring can serve this now (%s)." % "; ".join(words + more)
    return [ProxyError(known.kind, text) for _, known in skipped]


def spent_error(table: KeyTable, keys: Iterable[RingKey], routing: Routing, now: float,
                seen: Iterable[ProxyError]) -> ProxyError:
    """The most useful error when no key is left: of those seen, then of those remembered, with
    the earliest time at which one is fit again."""
    known = [(key, account_state(key, state_of(table, key, now), routing, now)) for key in keys]
    skipped = [(key, one) for key, one in known if one.reason]
    errors = [*seen, *memory_errors(skipped, now)] or [ProxyError("busy", "No key is free.")]
    best = min(errors, key=lambda error: USEFULNESS.get(min(error.status, 500), 5))
    ends = [one.until for _, one in skipped if one.until < NEVER_ENDS]
    best.retry_after = min(ends) - now if ends else best.retry_after
    if best.retry_after and len(skipped) < len(known):
        best.retry_after = 1.0      # a key is fit already: what failed was on the way to it
    return best


def operator_refusal(error: ProxyError, refused: List[RingKey]) -> ProxyError:
    """What callers are told in place of the upstream's 401 for keys that are not their own: it is
    the operator's fault, and to send the request again is no use."""
    also = "; also refused: " + ", ".join(map(key_words, refused[1:5])) if refused[1:] else ""
    also += " and %d more" % (len(refused) - 5) if len(refused) > 5 else ""
    return ProxyError("upstream_final", "Your request is not at fault: the operator's key %s was "
                      "refused by Command Code (401)%s. The proxy's operator must replace it "
                      "(commandcode.ai, settings, API keys); `ccproxy.py doctor` checks keys."
                      % (key_words(refused[0]), also), trace_id=error.trace_id)


# === CALLER LIMITS (pure) ===================================================
# How many requests a caller may send in a window of time.  The window begins
# with its first request; callers are known by a digest, and the least recently
# begun window makes room.

MAX_RATE_WINDOWS = 4096
RateWindow = Tuple[float, int]      # when it began, and how many requests came in it


def count_request(windows: Dict[str, RateWindow], digest: str, most: int, span: float,
                  now: float) -> None:
    """Count a request against its caller's window; `most` 0 is no limit.  Raises ProxyError 429."""
    if not most:
        return
    began, count = windows.get(digest, (-NEVER_ENDS, 0))
    if not 0 <= now - began < span:
        keep_newest(windows, digest, (now, 1), MAX_RATE_WINDOWS)
    elif count < most:
        windows[digest] = began, count + 1
    else:
        words = "More than %s in %s (rateLimitMax)."
        raise ProxyError("rate_limit", words % (counted(most, "request"), counted(span, "second")),
                         retry_after=began + span - now)


# === PART: OPERATION (pure) =================================================
# === TABLES & FIGURES (pure) ================================================
# How a terminal is told of things: counts, spans of time, money, moments, and
# tables of them.


def short_number(number: float) -> str:
    """A count in three digits: 131k of 131072, 1.05M of 1048576."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return "%.3g%s" % (number / size, unit)
    return "%d" % number


def short_span(seconds: float) -> str:
    """A span of time: 340ms, 9.99s, 12.3s, and from 100 seconds on in its two largest units."""
    if seconds < 0.9995:
        return "%.0fms" % (1000 * max(seconds, 0))
    if seconds < 100:
        return ("%.2fs" if seconds < 10 else "%.1fs") % seconds
    for unit, size, smaller, part in (("d", 86_400, "h", 3600), ("h", 3600, "m", 60)):
        if seconds >= size:
            return "%d%s%02d%s" % (seconds // size, unit, seconds % size // part, smaller)
    return "%dm%02ds" % (seconds // 60, seconds % 60)


def dollars(value: Optional[float]) -> str:
    return "-" if value is None else "%.2f" % value


def shown_moment(moment: Optional[float]) -> Optional[str]:
    """An epoch second as ISO 8601 in UTC; None for none, or one that no calendar holds."""
    from datetime import datetime, timezone         # rarely wanted, so not at start
    if not moment or not 0 < moment < 32_503_680_000:       # the year 3000
        return None
    return datetime.fromtimestamp(int(moment), timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def text_width(text: str) -> int:
    """Columns that a text takes: wide letters take two, marks on others none."""
    if text.isascii():
        return len(text)
    import unicodedata
    return sum(0 if unicodedata.combining(letter) else
               2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def cut_text(text: str, width: int) -> str:
    """A text of at most so many columns, with dots where something was left out."""
    if text_width(text) <= width:
        return text
    while text and text_width(text) > width - 1:
        text = text[:-1]
    return text + "\u2026"


def table_lines(heads: Tuple[str, ...], rows: Iterable[Tuple[str, ...]], align: str,
                width: int = 0) -> List[str]:
    """Lines of a table, its heads first.  `align` has a letter a column: l, r.  With a `width`,
    the widest columns give way until it fits."""
    table = [heads, *rows]
    sizes = [max(map(text_width, column)) for column in zip(*table)]
    while width and sum(sizes) + 2 * (len(sizes) - 1) > width and max(sizes) > 4:
        sizes[sizes.index(max(sizes))] -= 1
    lines = []
    for row in table:
        cells = []
        for cell, size, side in zip(row, sizes, align):
            shown = cut_text(cell, size)
            space = " " * (size - text_width(shown))
            cells.append(space + shown if side == "r" else shown + space)
        lines.append("  ".join(cells).rstrip())
    return lines


# === USAGE REPORT (pure) ====================================================
# What GET /v1/usage tells of the caller's own keys, and the admin route of the
# operator's: as JSON, or as a table for a terminal.  Keys appear by their names
# alone; models that a key was found not to serve are counted, not named.


def window_entry(window: Optional[Window]) -> Optional[Json]:
    if window is None:
        return None
    return {"used_usd": window.used, "cap_usd": window.cap, "exceeded": window.exceeded,
            "resets_at": shown_moment(window.resets)}


def account_entry(figures: Optional[Figures], now: float) -> Optional[Json]:
    """What is told of an account; None when nothing is known of it."""
    if figures is None:
        return None
    days, burn = days_left(figures, now), burn_of(figures, now)
    return {"plan": figures.plan or None, "status": figures.status or None,
            "credits_usd": {"monthly": figures.monthly, "free": figures.free,
                            "purchased": figures.purchased,
                            "expiring": round(figures.expiring, 6) if figures.known else None,
                            "balance": round(figures.balance, 6) if figures.known else None},
            "period_end": shown_moment(figures.period_end),
            "days_left": None if days is None else round(days, 2),
            "burn_usd_per_day": None if burn is None else round(burn, 6),
            "windows": {"five_hour": window_entry(figures.five_hour),
                        "weekly": window_entry(figures.weekly)},
            "age_seconds": round(max(now - figures.at, 0))}


def usage_entry(key: RingKey, state: KeyState, routing: Routing, now: float) -> Json:
    """All that is told of one key; `fit` is null while the upstream has not accepted it yet."""
    known = account_state(key, state, routing._replace(model="", upstream=""), now)
    models = [place for place, mark in state.marks.items()
              if place not in UNFIT_WORDS and mark.until > now]
    entry: Json = {"key": key.shown, "name": key.name or None, "weight": key.weight,
                   "state": known.word, "fit": {"usable": True, "unknown": None}.get(
                       known.word, False),
                   "reason": UNFIT_WORDS.get(known.reason), "fit_at": shown_moment(known.until),
                   "unreachable": state.unreached,
                   "models_passed_over": len(models), "in_flight": state.in_flight,
                   "account": account_entry(state.figures, now),
                   "through_proxy": {"requests": state.requests, "failures": state.failures,
                                     "input_tokens": state.input, "output_tokens": state.output,
                                     "cached_tokens": state.cached,
                                     "cost_usd": round(state.cost, 6)}}
    if key.allowed_models:
        entry["allowed_models"] = [redact(name) for name in key.allowed_models]
    return entry


def usage_body(table: KeyTable, caller: Caller, routing: Routing, now: float) -> Json:
    """The answer of /v1/usage: the caller's own keys in its own order."""
    return {"object": "ccproxy.usage", "keys_of": "operator" if caller.operator else "caller",
            "policy": routing.policy if len(caller.keys) > 1 else None,
            "keys": [usage_entry(key, state_of(table, key, now), routing, now)
                     for key in caller.keys]}


def window_cell(window: Optional[Json]) -> str:
    return "-" if window is None else "%s/%s%s" % (
        dollars(window["used_usd"]), dollars(window["cap_usd"]), "!" if window["exceeded"] else "")


def state_cell(entry: Json) -> str:
    """The state of an account: `usable`, or `skipped: it is in cooldown until ...`."""
    why = ": " + entry["reason"] if entry["state"] == "skipped" else ""
    return entry["state"] + why + (" until " + entry["fit_at"] if entry["fit_at"] else "")


def usage_row(entry: Json) -> Tuple[str, ...]:
    """One key's line of the table, a cell a column."""
    account, through = entry["account"] or {}, entry["through_proxy"]
    credits, windows = account.get("credits_usd", {}), account.get("windows", {})
    days = account.get("days_left")
    return (entry["key"], entry["name"] or "-", account.get("plan") or "-",
            dollars(credits.get("monthly")), dollars(credits.get("free")),
            dollars(credits.get("purchased")), "-" if days is None else "%.1f" % days,
            dollars(account.get("burn_usd_per_day")), window_cell(windows.get("five_hour")),
            window_cell(windows.get("weekly")), "%d" % through["requests"],
            "%d" % through["input_tokens"], "%d" % through["output_tokens"],
            "%d" % through["cached_tokens"], "%.4f" % through["cost_usd"],
            state_cell(entry))


USAGE_COLUMNS = ("KEY", "NAME", "PLAN", "MONTHLY", "FREE", "BOUGHT", "DAYS", "BURN/DAY", "5 HOURS",
                 "WEEK", "REQUESTS", "IN", "OUT", "CACHED", "COST", "STATE")


def usage_text(body: Json) -> str:
    """The same as a table for a terminal (?format=text); amounts in USD."""
    rows = [usage_row(entry) for entry in body["keys"]]
    return "\n".join(table_lines(USAGE_COLUMNS, rows, "lll" + 12 * "r" + "l")) + "\n"


# === ALERTS (pure) ==========================================================
# When the operator is told that something needs a look (ALERT_RULES).  From what
# is known now and the alerts that stood before follows which stand now and which
# must be told.  An alert is over only well within its limit, so that a value around
# it is told once.  What is not known begins no alert and ends none.


Limit = Tuple[float, float]                             # where an alert begins, and is over
Watched = Tuple[str, Optional[float], Optional[RingKey]]    # a kind, its value if known, whose


class AlertRule(NamedTuple):
    """What is watched: whether a value is beyond a limit, and the words for both.  `share` of its
    limit is where an alert is over, 0 where an option says so; one that is `lasting` must not have
    held for a while before."""

    beyond: Callable[[float, float], bool]
    words: str                      # {no} is "no more " where it is over
    share: float = 0.0
    lasting: bool = False


class Alert(NamedTuple):
    """A value beyond a limit; `kind` is a row of ALERT_RULES, the rest as it is shown."""

    key: str                        # by its name; "": of the whole proxy
    name: str                       # the operator's own word for it
    kind: str
    value: float
    limit: float
    since: float                    # epoch seconds


class Standing(NamedTuple):
    """An alert that stands, when it was told last, and when its value was beyond last."""

    alert: Alert
    told: float
    held: float


class News(NamedTuple):
    """What must be told now.  `event`: "alert" (also when told again) or "resolved"."""

    event: str
    alert: Alert
    text: str                       # one line for a person


def window_percentage(state: AccountState, figures: Figures, now: float) -> Optional[float]:
    """How much of a usage window is used, of the two the fuller; 0 where a usable account tells of
    none, or only of ones that were reset since."""
    if state.reason == "window":
        return 100.0
    told = [min(100 * one.used / one.cap, 1000.0)       # an odd cap may be next to nothing
            for one in (figures.five_hour, figures.weekly)
            if one is not None and one.cap > 0 and not 0 < one.resets <= now]
    return max(told, default=0.0 if state.word == "usable" and figures.at else None)


ALERT_RULES = {
    "minCurrentBalance": AlertRule(lt, "balance of {value:.2f} USD is {no}below minCurrentBalance "
                                   "{limit:.2f}", 1.1),
    "minExpiringBalance": AlertRule(lt, "expiring balance of {value:.2f} USD is {no}below "
                                    "minExpiringBalance {limit:.2f}", 1.1),
    "maxRequiredDailyBurn": AlertRule(gt, "required burn of {value:.2f} USD a day is {no}above "
                                      "maxRequiredDailyBurn {limit:.2f}", 0.9),
    "windowAlert": AlertRule(ge, "a usage window that is {value:.4g} % used is {no}at or above "
                             "windowAlert {limit:g} %"),
    "accountRefused": AlertRule(ge, "the key is {no}refused by the upstream (`ccproxy.py doctor` "
                                "checks keys)", 1.0, True),
    "accountsUnusable": AlertRule(ge, "the operator's accounts are {no}all unusable "
                                  "({value:.0f} %)", 1.0, True),
    "errorRateAlert": AlertRule(ge, "an error rate of {value:.4g} % is {no}at or above "
                                "errorRateAlert {limit:g} %")}
BALANCE_KINDS = ("minCurrentBalance", "minExpiringBalance", "maxRequiredDailyBurn")     # in USD


def alert_limits(config: Config) -> Dict[str, Limit]:
    """The limits that are set, by kind."""
    begins = {kind: getattr(config, snake_case(kind)) for kind in ALERT_RULES
              if snake_case(kind) in Config._fields}
    if config.account_alerts:
        begins.update(accountRefused=1.0, accountsUnusable=100.0)
    ends = {kind: limit * ALERT_RULES[kind].share for kind, limit in begins.items()}
    ends.update(windowAlert=min(config.window_alert_end, config.window_alert),
                errorRateAlert=min(config.error_rate_alert_end, config.error_rate_alert))
    return {kind: (limit, ends[kind]) for kind, limit in begins.items() if limit > 0}


def watch_account(key: RingKey, state: AccountState, figures: Optional[Figures],
                  now: float) -> List[Watched]:
    """All that is watched of an account; no burn where it is not told when credit expires."""
    known = fresh_figures(figures, now)
    expiring = known.expiring if (known.monthly, known.free) != (None, None) else None
    burn = expiring and burn_of(known, now)         # 0 where nothing expires
    values = {"minCurrentBalance": balance_of(known, now), "minExpiringBalance": expiring,
              "maxRequiredDailyBurn": burn if days_left(known, now) else None,
              "windowAlert": window_percentage(state, known, now),
              "accountRefused": float(state.word == "refused")}
    return [(kind, value, key) for kind, value in values.items()]


def watch_pool(states: List[AccountState]) -> List[Watched]:
    """How many of the operator's accounts are refused or skipped, in percent; nothing where there
    are none.  A lone key in cooldown is called all the same."""
    count = sum(one.word == "refused" or (one.word == "skipped" and not (
        one.reason == "cooldown" and len(states) == 1)) for one in states)
    return [("accountsUnusable", 100.0 * count / len(states), None)] if states else []


def alert_text(alert: Alert, no: str) -> str:
    """An alert as a line: `home (key:3fa9c1): balance of 1.20 USD is below ...`."""
    who = "%s (%s): " % (alert.name, alert.key) if alert.name else alert.key and alert.key + ": "
    return who + ALERT_RULES[alert.kind].words.format(no=no, **alert._asdict())


def judge_alert(old: Optional[Standing], alert: Alert, over: float, spans: Tuple[float, float],
                now: float) -> Tuple[Optional[Standing], Optional[News]]:
    """(what stands, what is told) of one value that is known; `spans` as in judge_alerts."""
    rule, (repeat, calm) = ALERT_RULES[alert.kind], spans
    if old is not None:
        alert = alert._replace(since=old.alert.since)
    if not rule.beyond(alert.value, alert.limit if old is None else over):
        if old is not None and rule.lasting and 0 <= now - old.held < calm:
            return old, None
        return None, old and News("resolved", alert, alert_text(alert, "no more "))
    if old is not None and not (repeat and not 0 <= now - old.told < repeat):
        return Standing(alert, old.told, now), None
    return Standing(alert, now, now), News("alert", alert, alert_text(alert, ""))


def judge_alerts(standing: Mapping[str, Standing], watched: Iterable[Watched],
                 limits: Mapping[str, Limit], spans: Tuple[float, float],
                 now: float) -> Tuple[Dict[str, Standing], List[News]]:
    """The alerts that stand now, by account and kind, and what must be told.  `spans`: seconds
    after which an alert that stands is told again, 0 for never; and for which a lasting one must
    not have held.  One whose key or limit is gone is over too."""
    stand: Dict[str, Standing] = {}
    news: List[Optional[News]] = []
    left = dict(standing)
    for kind, value, account in watched:
        if kind not in limits:
            continue
        place = "%s %s" % (account.digest if account else "", kind)
        old = kept = left.pop(place, None)
        if value is not None:
            key, name = (account.shown, account.name) if account else ("", "")
            begins, over = limits[kind]
            alert = Alert(key, name, kind, round(value, 6), begins, now)
            kept, told = judge_alert(old, alert, over, spans, now)
            news.append(told)
        if kept is not None:
            stand[place] = kept
    news += [News("resolved", old.alert, alert_text(old.alert, "") + "; not watched any more")
             for old in left.values()]
    return stand, [one for one in news if one is not None]


def alert_entry(alert: Alert) -> Json:
    return {**alert._asdict(), "name": alert.name or None}


def webhook_body(news: News, now: float) -> Json:
    """What is posted; `text` is what chat programs' webhooks show."""
    return {"source": "ccproxy", "event": news.event, "alert": alert_entry(news.alert),
            "text": "ccproxy: " + news.text, "at": shown_moment(now)}


# === REQUEST RECORDS (pure) =================================================
# What is kept of a request when it is over: figures and names, never a text of
# it, a key or an answer.  The log line, the database, the metrics and the page
# are all made of this one record.

MAX_RECORDS = 500           # in memory; the database (usageDb) keeps more

# Families of clients, by a word of their User-Agent; the first that fits counts.
CLIENT_FAMILIES = (
    (r"claude-(cli|code)|claude code", "claude-code"), (r"\bcodex", "codex"),
    (r"opencode", "opencode"), (r"\bpi[-/ ]", "pi"), (r"aider", "aider"), (r"cursor", "cursor"),
    (r"litellm", "litellm"), (r"langchain", "langchain"), (r"ai-sdk|\bai/", "ai-sdk"),
    (r"anthropic/js", "anthropic-js"), (r"anthropic/python", "anthropic-py"),
    (r"openai/js", "openai-js"), (r"openai/python", "openai-py"), (r"\bllm\b", "llm"),
    (r"^curl/", "curl"), (r"python-httpx|python-requests|python-urllib|aiohttp", "python"),
    (r"node|undici", "node"), (r"mozilla/", "browser"))


class Record(NamedTuple):
    """One generating request; times in seconds, None is not known.  `status` 499: the client left.
    `error` begins with the kind of failure (ERRORS) and a colon."""

    at: float                           # epoch seconds: when it began
    api: str
    client: str                         # family
    asked: str                          # model
    model: str
    key: str                            # by its name
    status: int
    stream: bool
    input: Optional[int]
    output: Optional[int]
    cached: Optional[int]
    reasoning: Optional[int]
    cost: Optional[float]               # USD
    first: Optional[float]              # to the first event
    total: float
    retries: int
    notes: str
    error: str
    trace: str                          # the upstream's


def client_family(agent: str) -> str:
    """The family of a client by its User-Agent, "other" for one that is not known."""
    return read_family(agent[:400])


@lru_cache(maxsize=256)         # a handful of clients send all requests
def read_family(agent: str) -> str:
    return next((name for pattern, name in CLIENT_FAMILIES if re.search(pattern, agent, re.I)),
                "other")


def read_cost(cost: Optional[str]) -> Optional[float]:
    """What the upstream wrote as a cost, as a number."""
    try:
        value = float(cost or "nan")
    except ValueError:
        return None
    return value if 0 <= value < 1e6 else None


# === HISTORY (pure) =========================================================
# The last hour, minute by minute, counted record by record: what the charts and
# `top` show.  Times to the first event are counted in steps of 5 %, so that any
# number of them takes bounded room; a share of them is right within 3 %.

HISTORY_MINUTES = 60
TIME_STEP = log(1.05)
SHORTEST_TIME, LONGEST_TIME = 0.001, 7200.0     # seconds: 325 steps lie between


@dataclass(**SLOTS)
class Minute:
    """What ended within one minute."""

    requests: int = 0
    errors: int = 0
    input: int = 0
    output: int = 0
    cached: int = 0
    firsts: Dict[int, int] = field(default_factory=dict)    # by their step: how many


Minutes = Dict[int, Minute]         # by the minute's number since the epoch


def is_failure(record: Record) -> bool:
    """Whether a request went wrong, also in the middle of its stream; not: the client left."""
    return record.status != 499 and (record.status >= 400 or record.error != "")


def error_percentage(records: Iterable[Record], since: float, least: float) -> Optional[float]:
    """How many of the requests that ended since then failed; None for fewer than `least`, or 0."""
    ended = [record for record in records if record.at + record.total >= since]
    if len(ended) < max(least, 1):
        return None
    return 100.0 * sum(map(is_failure, ended)) / len(ended)


def count_record(minutes: Minutes, record: Record) -> None:
    """Count a request in the minute of its end, and forget what is older than an hour (or, the
    clock having been set back, lies in the future)."""
    number = int((record.at + record.total) // 60)
    minute = minutes.get(number)
    if minute is None:
        for old in [one for one in minutes if not number - HISTORY_MINUTES < one < number + 2]:
            del minutes[old]
        minute = minutes[number] = Minute()
    minute.requests += 1
    minute.errors += is_failure(record)
    minute.input += record.input or 0
    minute.output += record.output or 0
    minute.cached += record.cached or 0
    if record.first is not None:
        step = ceil(log(min(max(record.first, SHORTEST_TIME), LONGEST_TIME)) / TIME_STEP)
        minute.firsts[step] = minute.firsts.get(step, 0) + 1


def share_of_times(firsts: Mapping[int, int], share: float) -> Optional[float]:
    """The time within which this share of all lies; None without any."""
    wanted = share * sum(firsts.values())
    for step in sorted(firsts):
        wanted -= firsts[step]
        if wanted <= 0:
            return round(1.05 ** (step - 0.5), 4)
    return None


def minute_entry(number: int, minute: Minute) -> Json:
    """A minute as the page and the events show it."""
    return {"at": number * 60, "requests": minute.requests, "errors": minute.errors,
            "input": minute.input, "output": minute.output, "cached": minute.cached,
            "first_p50": share_of_times(minute.firsts, 0.5),
            "first_p95": share_of_times(minute.firsts, 0.95)}


def minute_entries(minutes: Minutes, now: float) -> List[Json]:
    """The minutes of the last hour in which anything ended, oldest first."""
    newest = int(now // 60)
    return [minute_entry(number, minutes[number]) for number in sorted(minutes)
            if newest - HISTORY_MINUTES < number <= newest]


# === METRICS (pure) =========================================================
# Counting records, and showing the counts to Prometheus (text format 0.0.4).
# All that is counted is one flat table from (metric, label values...) to a number
# that only grows; a histogram's entry ends with the number of its bucket, or
# "sum".  Every label has values from a table, or from the list of models; what
# is not there is "other": nothing that a client or the upstream says can make a
# new series.

MAX_MODEL_LABELS = 200
MAX_COUNT = 10 ** 12                # tokens that one record may add: the upstream tells any number
FIRST_BOUNDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120)
TOTAL_BOUNDS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
LABEL_ESCAPES = {ord("\\"): "\\\\", ord('"'): '\\"', ord("\n"): "\\n"}
STATUS_CLASSES = {2: "2xx", 3: "3xx", 4: "4xx", 5: "5xx"}
API_NAMES = frozenset(face.name for face in (CHAT, MESSAGES, RESPONSES))
CLIENT_NAMES = frozenset(name for _, name in CLIENT_FAMILIES)
NOTE_CODES = frozenset((
    "clamped", "cut", "dropped", "effort", "failover", "ignored", "json_format", "json_invalid",
    "json_repaired", "left_out", "model", "pictures", "prefill", "renamed", "repaired", "replaced",
    "retried", "schema", "tool_input", "unreadable", "usage"))

Counts = Dict[Tuple[str, ...], Any]


class Metric(NamedTuple):
    """One family of series; a histogram has bounds."""

    name: str                       # behind "ccproxy_"
    kind: str
    help: str
    labels: Tuple[str, ...] = ()
    bounds: Tuple[float, ...] = ()


METRICS = (
    Metric("build_info", "gauge", "Version of ccproxy and of Python.", ("version", "python")),
    Metric("uptime_seconds", "gauge", "Time since the process began to listen.", ("worker",)),
    Metric("requests_total", "counter", "Generating requests that are over, by status class "
           "(left: the client hung up).", ("api", "client", "status", "stream")),
    Metric("model_requests_total", "counter", "The same by model.", ("model", "status")),
    Metric("errors_total", "counter", "Requests that failed, also in the middle of a stream, by "
           "kind of failure.", ("kind",)),
    Metric("tokens_total", "counter", "Tokens as the upstream told them; cached is part of input, "
           "reasoning of output.", ("model", "kind")),
    Metric("cost_usd_total", "counter", "What answers cost, where the upstream told it."),
    Metric("cache_share_ratio", "gauge", "Share of all input tokens that came from a cache."),
    Metric("retries_total", "counter", "Upstream calls that were made anew."),
    Metric("failovers_total", "counter", "Of these, those with another key."),
    Metric("splices_total", "counter", "Of these, those behind thinking that was shown."),
    Metric("notes_total", "counter", "What was dropped, clamped or changed, by code of the note.",
           ("code",)),
    Metric("first_event_seconds", "histogram", "Time to the first event of an answer.",
           ("stream",), FIRST_BOUNDS),
    Metric("request_seconds", "histogram", "Time of a whole request.", ("stream",), TOTAL_BOUNDS),
    Metric("open_streams", "gauge", "Answers being relayed, streamed or not."),
    Metric("requests_in_flight", "gauge", "Generating requests being served."),
    Metric("client_connections", "gauge", "Open connections of clients."),
    Metric("upstream_idle_connections", "gauge", "Connections to the upstream kept for reuse."),
    Metric("upstream_connections_total", "counter", "Connections for upstream calls, newly opened "
           "or reused.", ("kind",)),
    Metric("resident_memory_bytes", "gauge", "Memory of the process (its peak where the system "
           "tells no more).", ("worker",)),
    Metric("open_descriptors", "gauge", "File descriptors of the process.", ("worker",)),
    Metric("usage_records_lost_total", "counter", "Records that did not get into usageDb."))
FROM_ZERO = (("cost_usd_total",), ("retries_total",), ("failovers_total",), ("splices_total",),
             ("usage_records_lost_total",))     # shown before they first happen


@dataclass
class Metrics:
    """What was counted so far, and the models that have a label of their own."""

    counts: Counts = field(default_factory=lambda: defaultdict(int, dict.fromkeys(FROM_ZERO, 0)))
    models: Dict[str, str] = field(default_factory=dict)    # id -> label


def model_label(metrics: Metrics, name: str, models: Models,
                lent: Mapping[str, Collection[str]]) -> str:
    """The id of a model that the list or a vendor's row (`lent`) knows, "other" for the rest and
    beyond a bound.  No key can stand there, whatever a client sends."""
    vendor, _, model = name.partition("/")
    if vendor in lent:
        return name if model in lent[vendor] else vendor + "/other"
    found = models.known.get(name.lower())
    if found is None:
        return "other"
    if found.id not in metrics.models:
        if len(metrics.models) >= MAX_MODEL_LABELS:
            return "other"
        metrics.models[found.id] = printable(found.id, 100)
    return metrics.models[found.id]


def error_kind(record: Record) -> str:
    """The kind of a failed request, of those that ERRORS knows."""
    kind = record.error.partition(":")[0]
    return kind if kind in KINDS else "client_left" if record.status == 499 else "other"


def count_span(counts: Counts, name: str, stream: str, bounds: Tuple[float, ...],
               seconds: float) -> None:
    counts[name, stream, str(bisect.bisect_left(bounds, seconds))] += 1
    counts[name, stream, "sum"] += seconds


def count_notes(counts: Counts, notes: str) -> None:
    for note in notes.split("; "):
        code = note.partition("=")[0]
        counts["notes_total", code if code in NOTE_CODES else "other"] += 1
        if code == "failover":
            counts["failovers_total",] += 1


def measure_record(metrics: Metrics, record: Record, models: Models,
                   lent: Optional[Mapping[str, Collection[str]]] = None) -> None:
    """Count one finished request."""
    counts, stream = metrics.counts, "true" if record.stream else "false"
    status = "left" if record.status == 499 else STATUS_CLASSES.get(record.status // 100, "other")
    model = model_label(metrics, record.model, models, lent or {})
    counts["requests_total", record.api if record.api in API_NAMES else "other",
           record.client if record.client in CLIENT_NAMES else "other", status, stream] += 1
    counts["model_requests_total", model, status] += 1
    for kind, tokens in (("input", record.input), ("output", record.output),
                         ("cached", record.cached), ("reasoning", record.reasoning)):
        if tokens:
            counts["tokens_total", model, kind] += min(tokens, MAX_COUNT)
    if record.error:
        counts["errors_total", error_kind(record)] += 1
    if record.notes:
        count_notes(counts, record.notes)
    if record.first is not None:
        count_span(counts, "first_event_seconds", stream, FIRST_BOUNDS, record.first)
    count_span(counts, "request_seconds", stream, TOTAL_BOUNDS, record.total)
    counts["cost_usd_total",] += record.cost or 0
    counts["retries_total",] += record.retries


def cache_share(counts: Counts) -> Optional[float]:
    """The share of input that was cached, None before there was any input."""
    sums = {kind: sum(number for key, number in counts.items()
                      if key[0] == "tokens_total" and key[2] == kind)
            for kind in ("input", "cached")}
    return sums["cached"] / sums["input"] if sums["input"] else None


def label_text(names: Iterable[str], values: Iterable[str]) -> str:
    pairs = ['%s="%s"' % (name, value.translate(LABEL_ESCAPES))
             for name, value in zip(names, values)]
    return "{%s}" % ",".join(pairs) if pairs else ""


def histogram_lines(metric: Metric, samples: Dict[Tuple[str, ...], Any]) -> List[str]:
    """A histogram's lines: buckets that hold all that is not above their bound, sum, count."""
    lines = []
    for values in sorted({key[:-1] for key in samples}):
        total = 0
        for place, bound in enumerate([*map(repr, metric.bounds), "+Inf"]):
            total += samples.get((*values, str(place)), 0)
            lines.append("ccproxy_%s_bucket%s %d" % (
                metric.name, label_text((*metric.labels, "le"), (*values, bound)), total))
        labels = label_text(metric.labels, values)
        lines.append("ccproxy_%s_sum%s %r" % (metric.name, labels,
                                              samples.get((*values, "sum"), 0)))
        lines.append("ccproxy_%s_count%s %d" % (metric.name, labels, total))
    return lines


def render_metrics(counts: Counts) -> str:
    """All that was counted, in the text format of Prometheus 0.0.4."""
    lines = []
    for metric in METRICS:
        samples = {key[1:]: number for key, number in counts.items() if key[0] == metric.name}
        if not samples:
            continue
        lines.append("# HELP ccproxy_%s %s" % (metric.name, metric.help))
        lines.append("# TYPE ccproxy_%s %s" % (metric.name, metric.kind))
        if metric.bounds:
            lines += histogram_lines(metric, samples)
            continue
        lines += ["ccproxy_%s%s %r" % (metric.name, label_text(metric.labels, values), number)
                  for values, number in sorted(samples.items())]
    return "\n".join(lines) + "\n"


# === ADMIN ACCESS (pure) ====================================================
# Who may read and who may change what /admin, /metrics and the page show.
# Reading from this machine needs no key, but the request must be its own user's:
# a page of another site, or a name that was bound anew, makes a browser send
# requests here too.  From elsewhere, and for every change, a key is asked for.
# Guessing it is slowed down, for each client address by itself.

MIN_ADMIN_KEY = 16              # characters, where other machines can guess
MAX_WRONG_KEYS = 5              # from one address
WRONG_KEY_SECONDS = 60.0        # in which they count, and the longest wait after them
MAX_GUESSERS = 1000             # addresses that are remembered; the oldest goes first


@dataclass(eq=False, **SLOTS)
class Guesses:
    """The wrong keys that came from one address, by a clock that is never set."""

    moments: Deque[float] = field(
        default_factory=lambda: deque([-NEVER_ENDS] * MAX_WRONG_KEYS, MAX_WRONG_KEYS))
    wait: float = 1.0               # seconds, as Retry-After tells them next
    until: float = -NEVER_ENDS      # before this even the right key is refused


def judge_guess(known: Dict[str, Guesses], address: str, wrong: bool, now: float) -> None:
    """Count a request that presents a key, and refuse it while its address has to wait: the right
    key too, or the answer would tell which one that is.  Raises ProxyError 429."""
    guesses = known.get(address) or Guesses()
    if now - guesses.until >= (WRONG_KEY_SECONDS if wrong else 0.0):
        if wrong:               # the last of too many begins the wait
            guesses.moments.append(now)
            guesses.wait = 1.0
            if now - guesses.moments[0] < WRONG_KEY_SECONDS:
                guesses.until = now + guesses.wait
            keep_newest(known, address, guesses, MAX_GUESSERS)
        return
    wait, guesses.wait = guesses.wait, min(2 * guesses.wait, WRONG_KEY_SECONDS)
    if wrong:                   # who asks every second with the right key gets in again
        guesses.until = now + wait
    raise ProxyError("rate_limit", "Too many wrong adminKeys came from this address. Try again in "
                     "%s." % counted(wait, "second"), retry_after=wait)


def check_reader(fields: Fields, config: Config, peer: str) -> None:
    """Let a reader pass who is on this machine or presents adminKey, or clientKey where that is
    unset.  Raises ProxyError 401, 403."""
    secret = config.admin_key or config.client_key
    if secret and presents_client_key(fields, secret):
        return
    fault = loopback_fault(fields, peer, "GET")
    if fault and secret:
        name = "adminKey" if config.admin_key else "clientKey"
        raise ProxyError("authentication", "This wants the proxy's %s as `Authorization: "
                         "Bearer ...`: %s." % (name, fault))
    if fault:
        raise ProxyError("permission", "This can be read on the proxy's own machine only, until "
                         "adminKey is set: %s." % fault)


def check_writer(fields: Fields, config: Config, peer: str) -> None:
    """Let nobody change anything without the adminKey.  Raises ProxyError 401, 403."""
    if not config.admin_key:
        raise ProxyError("permission", "Changes need an adminKey, and none is configured: set "
                         "adminKey and start again.")
    if not presents_client_key(fields, config.admin_key):
        raise ProxyError("authentication", "Changes want the proxy's adminKey as `Authorization: "
                         "Bearer ...`.")


def check_admin_key(config: Config) -> None:
    """Refuse an adminKey that callers have too, or that other machines could guess: whoever has it
    can lead callers' keys elsewhere.  Raises ProxyError `config`."""
    if KEY_PATTERN.search(config.admin_key):
        raise ProxyError("config", "adminKey looks like a Command Code key (user_...): choose "
                         "another, which no caller sends", param="adminKey")
    if config.admin_key and config.admin_key == config.client_key:
        raise ProxyError("config", "adminKey must not be the clientKey: every caller could change "
                         "everything", param="adminKey")
    if 0 < len(config.admin_key) < MIN_ADMIN_KEY and not LOOPBACK.fullmatch(config.host):
        raise ProxyError("config", "adminKey is shorter than %d characters, and host %s is "
                         "reachable from other machines: choose a longer one" % (
                             MIN_ADMIN_KEY, config.host), param="adminKey")


# === CONFIG CHANGES (pure) ==================================================
# The config file's entries changed over HTTP: what is asked for is read, merged
# and told of, secrets never.  Options with `at_start` keep the value that the
# program was started with until it starts again; flags and the environment win
# over the file as ever.


def decode_entries(text: str, path: str) -> Json:
    """The entries in a config file's text.  Raises ProxyError `config`."""
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ProxyError("config", "%s: is not JSON: %s at line %d, column %d" % (
            path, error.msg, error.lineno, error.colno)) from None
    except (ValueError, RecursionError) as error:
        raise ProxyError("config", "%s: is not usable: %s" % (path, error)) from None
    if not isinstance(entries, dict):
        raise ProxyError("config", "%s: must hold one JSON object" % path)
    return entries


def holds_secret(text: bytes) -> bool:
    """Whether a secret option is named in the text of a config file."""
    return any(b'"%b"' % option.name.encode() in text for option in OPTIONS
               if option.secret)


def read_changes(body: Json) -> Json:
    """What a request wants the config file's entries to be, each in its option's own type; null
    is for taking one out, all that can be done with a removed option.  Raises ProxyError
    `config`."""
    options = {option.name: option for option in OPTIONS}
    check_entries({name: "" for name in body}, "the request")
    changes: Json = {}
    for name, given in body.items():
        if given is None:
            changes[name] = None
        elif name in options:
            value = read_value(options[name], given, "the request")
            whole = isinstance(value, float) and value == int(value)
            changes[name] = int(value) if whole else value
    return changes


def keep_started(config: Config, running: Config) -> Config:
    """A new configuration as far as it counts without a start."""
    return Config(*(old if option.at_start else new
                    for option, new, old in zip(OPTIONS, config, running)))


def changed_options(config: Config, before: Config) -> List[str]:
    return [option.name for option, new, old in zip(OPTIONS, config, before) if new != old]


def waiting_options(config: Config, running: Config) -> List[str]:
    """The options whose new value waits for the next start."""
    return changed_options(config, keep_started(config, running))


def change_report(names: Iterable[str], waiting: Iterable[str],
                  sources: Mapping[str, str]) -> Json:
    """What became of each of the options that were to change."""
    report: Json = {"applied": [], "restart_needed": [], "overridden": {}}
    for name in names:
        if sources.get(name, "").startswith(("--", "environment ")):
            report["overridden"][name] = sources[name]
        else:
            report["restart_needed" if name in waiting else "applied"].append(name)
    return report


def option_entry(option: Option, value: Any, source: str) -> Json:
    secret = option.secret
    shown = None if secret else json.loads(redact(json.dumps(value)))
    return {"name": option.name, "kind": option.kind, "value": shown,
            "default": None if secret else option.default, "choices": list(option.choices),
            "help": option.help, "source": source, "at_start": option.at_start, "secret": secret,
            "set": bool(value) if secret else source != "default"}


def as_refusal(error: ProxyError) -> ProxyError:
    """What is wrong with a configuration, as a client's mistake."""
    if error.kind != "config":
        return error
    return ProxyError("invalid", redact(error.message), param=error.param and redact(error.param))


# === CLIENT SETTINGS (pure) =================================================
# What each client takes to be led here: an environment, arguments where that
# does not do, a file where neither does, and the settings of others that would
# win over them.  Each was tried with the real program.  One table serves
# `run`, `env` and `setup`; the environment as lines for three shells.

KEY_VARIABLE = "COMMANDCODE_KEY"
KEY_MARK = "\0key"      # stands for the key where only a reference to it may be shown
NO_KEY = "no-key"       # for a proxy that asks for none: programs want some word
LOOPBACK_NAMES = "127.0.0.1,localhost,::1"


class Target(NamedTuple):
    """Where a client is led: the proxy's address, the caller's key, and the model."""

    base: str               # http://127.0.0.1:3000
    key: str
    model: Model
    models: Tuple[Model, ...] = ()      # that may be chosen besides
    folder: str = ""                    # of `Client.files`; "" where no file is written
    program: str = "python3 ccproxy.py"     # how this program was started, for hints
    again: str = ""                     # the whole command that prints the same environment


class Client(NamedTuple):
    """One row of CLIENTS."""

    package: str                    # what is to be installed
    foreign: str                    # names of settings that would defeat ours
    environment: Callable[[Target], Dict[str, str]] = lambda target: {KEY_VARIABLE: target.key}
    arguments: Callable[[Target], List[str]] = lambda target: []    # before the person's own
    files: Callable[[Target], Dict[str, str]] = lambda target: {}
    home: str = ""                  # the variable that names the folder of `files`
    advice: Callable[[Target], List[str]] = lambda target: []   # what `env` cannot put into words


def claude_models(target: Target) -> Dict[str, str]:
    """The model for all that Claude Code does; beside a Claude model its own choices stay."""
    names = {"ANTHROPIC_BASE_URL": target.base, "ANTHROPIC_MODEL": target.model.id}
    if not target.model.id.startswith("claude"):
        names.update(("ANTHROPIC_DEFAULT_%s_MODEL" % family, target.model.id)
                     for family in ("OPUS", "SONNET", "HAIKU", "FABLE"))
        if target.model.context:        # else it takes a name that it does not know for 1m tokens
            names["CLAUDE_CODE_MAX_CONTEXT_TOKENS"] = str(target.model.context)
    return names


def claude_environment(target: Target) -> Dict[str, str]:
    """A token, not ANTHROPIC_API_KEY: that one is asked about at the start.  MANAGED_BY_HOST lets
    this win over settings.json, and keeps the key from the commands that the model runs."""
    return {**claude_models(target), "ANTHROPIC_AUTH_TOKEN": target.key,
            "CLAUDE_CODE_PROVIDER_MANAGED_BY_HOST": "1"}


def codex_entries(target: Target) -> Json:
    """What Codex' config.toml gets; its table last."""
    entries: Json = {"model": target.model.id, "model_provider": "ccproxy"}
    if target.model.context:
        entries["model_context_window"] = target.model.context
    return {**entries, "model_providers": {"ccproxy": {
        "name": "ccproxy", "base_url": target.base + "/v1", "env_key": KEY_VARIABLE,
        "wire_api": "responses"}}}


def codex_arguments(target: Target) -> List[str]:
    """Its configuration as -c words: without quotes, which Windows would eat; what is no TOML
    counts as a string."""
    words = codex_entries(target)
    provider = words.pop("model_providers")["ccproxy"]
    words.update(("model_providers.ccproxy." + name, value) for name, value in provider.items())
    return [word for name, value in words.items() for word in ("-c", "%s=%s" % (name, value))]


def opencode_model(model: Model) -> Json:
    """A model as opencode declares one; its output is part of its context."""
    entry: Json = {"name": model.name, "attachment": model.vision, "tool_call": True,
                   "modalities": {"input": ["text"] + ["image"] * model.vision,
                                  "output": ["text"]}}
    if model.context:
        output = min(model.max_output or DEFAULT_OUTPUT_TOKENS, model.context // 2)
        entry["limit"] = {"context": model.context, "output": output}
    return entry


def opencode_entries(target: Target) -> Json:
    """What opencode's configuration gets."""
    chosen = "ccproxy/" + target.model.id
    models = {model.id: opencode_model(model) for model in (target.model,) + target.models}
    return {"model": chosen, "small_model": chosen, "provider": {"ccproxy": {
        "npm": "@ai-sdk/openai-compatible", "name": "ccproxy", "options": {
            "baseURL": target.base + "/v1", "apiKey": "{env:%s}" % KEY_VARIABLE},
        "models": models}}}


def opencode_environment(target: Target) -> Dict[str, str]:
    return {"OPENCODE_CONFIG_CONTENT": json.dumps(opencode_entries(target),
                                                  separators=(",", ":")),
            KEY_VARIABLE: target.key}


def aider_environment(target: Target) -> Dict[str, str]:
    """Its own names for its flags: a project's .env may hold others for OPENAI_*, and wins."""
    model = "openai/" + target.model.id
    return {"AIDER_OPENAI_API_BASE": target.base + "/v1", "AIDER_OPENAI_API_KEY": target.key,
            "AIDER_MODEL": model, "AIDER_WEAK_MODEL": model, "AIDER_EDITOR_MODEL": model,
            "AIDER_SHOW_MODEL_WARNINGS": "false"}


def llm_environment(target: Target) -> Dict[str, str]:
    """With a folder any model, without one OpenAI's: llm knows others from a file alone."""
    if target.folder:
        return {"LLM_USER_PATH": target.folder, "LLM_MODEL": target.model.id,
                "OPENAI_API_KEY": target.key}
    return {"OPENAI_BASE_URL": target.base + "/v1", "OPENAI_API_KEY": target.key}


def llm_files(target: Target) -> Dict[str, str]:
    """A model of its own key name, so that no key that llm stores is taken (JSON is YAML)."""
    model: Json = {"model_id": target.model.id, "model_name": target.model.id,
                   "api_base": target.base + "/v1", "api_key_name": "ccproxy",
                   "supports_tools": True, "supports_schema": True}
    if target.model.vision:
        model["vision"] = True
    return {"extra-openai-models.yaml": "- %s\n" % json.dumps(model)}


def llm_advice(target: Target) -> List[str]:
    return ["llm takes OpenAI's model names alone from here (llm -m gpt-5.5), and a key stored as",
            "`openai` wins. Any model: %s run llm" % target.program,
            "or this line in the file extra-openai-models.yaml of llm's folder (then llm -m %s):"
            % target.model.id,
            llm_files(target)["extra-openai-models.yaml"].strip()]


def pi_provider(target: Target) -> Json:
    model = target.model
    return {"name": "ccproxy", "baseUrl": target.base + "/v1", "apiKey": KEY_VARIABLE,
            "api": "openai-completions", "models": [{
                "id": model.id, "name": model.name, "reasoning": model.efforts != (),
                "input": ["text"] + ["image"] * model.vision,
                "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
                "contextWindow": model.context or 128_000,
                "maxTokens": model.max_output or DEFAULT_OUTPUT_TOKENS}]}


def pi_files(target: Target) -> Dict[str, str]:
    """An extension, which leaves pi's own folder as it is."""
    return {"ccproxy.js": "export default (pi) => pi.registerProvider(\"ccproxy\", %s);\n"
                          % json.dumps(pi_provider(target))}


def pi_arguments(target: Target) -> List[str]:
    chosen = ["--provider", "ccproxy", "--model", target.model.id]
    return ["--extension", target.folder + "/ccproxy.js"] + chosen if target.folder else chosen


def pi_advice(target: Target) -> List[str]:
    return ["pi knows other addresses from a file alone: %s run pi" % target.program,
            "brings one, or put this into ~/.pi/agent/models.json:",
            json.dumps({"providers": {"ccproxy": pi_provider(target)}})]


CLIENTS: Dict[str, Client] = {
    "claude": Client("@anthropic-ai/claude-code (npm)",
                     "ANTHROPIC_.*|CLAUDE_CODE_(USE_(BEDROCK|VERTEX|FOUNDRY|MANTLE|GATEWAY)|"
                     "USE_ANTHROPIC_.*|OAUTH_.*|API_KEY_FILE_DESCRIPTOR|API_BASE_URL|"
                     "SUBAGENT_MODEL.*|MAX_CONTEXT_TOKENS|HOST_.*)", claude_environment),
    "codex": Client("@openai/codex (npm)", "CODEX_(API_KEY|ACCESS_TOKEN)|OPENAI_.*",
                    arguments=codex_arguments),
    "opencode": Client("opencode-ai (npm)", "OPENCODE_CONFIG_CONTENT", opencode_environment),
    "aider": Client("aider-chat (PyPI)", "OPENAI_.*|AIDER_(OPENAI_.*|(WEAK_|EDITOR_)?MODEL)",
                    aider_environment),
    "llm": Client("llm (PyPI)", "OPENAI_.*|LLM_(MODEL|USER_PATH)", llm_environment,
                  files=llm_files, home="LLM_USER_PATH", advice=llm_advice),
    "pi": Client("@mariozechner/pi-coding-agent (npm)", "", arguments=pi_arguments, files=pi_files,
                 advice=pi_advice)}


def foreign_names(client: Client, environment: Iterable[str]) -> List[str]:
    """Names of an environment that would lead the client elsewhere."""
    return sorted(name for name in environment if re.fullmatch(client.foreign, name))


def without_detour(environment: Mapping[str, str]) -> Dict[str, str]:
    """NO_PROXY with loopback in it, where an HTTP proxy is set: it could not come back here."""
    named = {name.lower(): value for name, value in environment.items() if value}
    if not {"http_proxy", "https_proxy", "all_proxy"} & set(named):
        return {}
    given = named.get("no_proxy", "")
    value = given if given == "*" else ",".join(filter(None, (given, LOOPBACK_NAMES)))
    return {"NO_PROXY": value, "no_proxy": value}


class Shell(NamedTuple):
    """How a shell writes settings: templates of a name, and of a name and a quoted value."""

    setting: str
    unset: str
    reference: str          # to a variable
    quoted: Callable[[str], str]
    use: str                # how the printed lines are taken in, of a command


SHELLS = {
    "sh": Shell("export %s=%s", "unset %s", '"${%s}"',
                lambda text: "'%s'" % text.replace("'", "'\\''"), 'eval "$(%s)"'),
    "fish": Shell("set -gx %s %s", "set -e %s", '"$%s"',
                  lambda text: "'%s'" % re.sub(r"([\\'])", r"\\\1", text),
                  "%s --shell fish | source"),
    # PowerShell takes curly quotes for straight ones.
    "powershell": Shell("$env:%s = %s", "Remove-Item Env:%s", "$env:%s",
                        lambda text: "'%s'" % re.sub("(['\u2018-\u201b])", r"\1\1", text),
                        "%s --shell powershell | Out-String | Invoke-Expression")}


def shell_of(variables: Mapping[str, str], windows: bool) -> str:
    """The shell that a person most likely uses, by $SHELL."""
    name = re.split(r"[/\\]", variables.get("SHELL", ""))[-1]
    known = {"fish": "fish", "pwsh": "powershell", "powershell": "powershell"}
    return known.get(name, "powershell" if windows and not name else "sh")


def shell_word(word: str, shell: Shell) -> str:
    return word if re.fullmatch("[A-Za-z0-9@%_+=:,./-]+", word) else shell.quoted(word)


def environment_lines(name: str, target: Target, shell: Shell,
                      variables: Mapping[str, str]) -> List[str]:
    """A client's environment in the words of a shell; of the key only KEY_VARIABLE."""
    client = CLIENTS[name]
    wanted = {**client.environment(target), **without_detour(variables)}
    lines = ["# %s by way of ccproxy on %s; first set %s to your key (user_...), or its "
             "clientKey" % (name, target.base, KEY_VARIABLE),
             "# use: " + shell.use % (target.again or "%s env %s" % (target.program, name))]
    lines += [shell.unset % one for one in foreign_names(client, variables) if one not in wanted]
    lines += [shell.setting % (one, shell.reference % KEY_VARIABLE if value == KEY_MARK
                               else shell.quoted(value)) for one, value in wanted.items()]
    words = client.arguments(target)
    if words:
        lines.append("# the rest does not fit into an environment; start it as:")
        lines.append("# %s %s" % (name, " ".join(shell_word(word, shell) for word in words)))
    return lines + ["# " + line for line in client.advice(target)]


# === JSON FILES (pure) ======================================================
# Other programs' JSON settings: entries set and removed, all others kept, in
# their order.  A text that does not parse is refused, so one with comments, which
# would be lost, is never written.

ENTRY_GONE = object()   # in place of a value: the entry is to be removed
Path = Tuple[str, ...]      # an entry of the file, or of an object in it


def load_object(text: str, path: str) -> Json:
    """The object in a JSON file's text; nothing counts as an empty one.  Raises ProxyError."""
    return decode_entries(text, path) if text.strip() else {}


def dump_object(settings: Json, like: str, path: str) -> str:
    """A JSON text with the indentation and line ends of another.  Raises ProxyError `config`."""
    found = re.search(r"\n([ \t]+)\S", like)
    indent = found[1] if found else "  " if like.strip() in ("", "{}") else None
    try:
        escaped = SURROGATE.search(json.dumps(settings, ensure_ascii=False, allow_nan=False))
        text = json.dumps(settings, ensure_ascii=bool(escaped), indent=indent) + "\n"
    except (ValueError, RecursionError):
        raise ProxyError("config", "%s: holds a number or a nesting that cannot be written again"
                         % path) from None
    return text.replace("\n", "\r\n") if "\r\n" in like else text


def entry_at(value: Any, path: Path) -> Any:
    for name in path:
        value = value.get(name, ENTRY_GONE) if isinstance(value, dict) else ENTRY_GONE
    return value


def put_entries(settings: Json, entries: Mapping[Path, Any], path: str) -> None:
    """Set entries, in an object that is made where there is none, or remove them.  Raises
    ProxyError `config`."""
    for place, value in entries.items():
        if value is ENTRY_GONE and entry_at(settings, place) is ENTRY_GONE:
            continue
        held = settings.setdefault(place[0], {}) if place[1:] else settings
        if not isinstance(held, dict):
            raise ProxyError("config", "%s: %s is not an object" % (path, place[0]))
        held[place[-1]] = value
        if value is ENTRY_GONE:
            del held[place[-1]]


def edit_json(text: str, entries: Mapping[Path, Any], path: str) -> str:
    """A JSON text with these entries.  Raises ProxyError `config`."""
    settings = load_object(text, path)
    put_entries(settings, entries, path)
    return dump_object(settings, text, path)


def restore_json(text: str, before: str, paths: Collection[Path], path: str) -> str:
    """A text with these entries as they were before, without objects that were made for them;
    the text before where nothing else has changed.  Raises ProxyError `config`."""
    had, now = load_object(before, path), load_object(text, path)
    put_entries(now, {place: entry_at(had, place) for place in paths}, path)
    for name in {place[0] for place in paths if place[0] not in had}:
        if now.get(name) == {}:
            del now[name]
    return before if now == had else dump_object(now, text, path)


# === TOML FILES (pure) ======================================================
# The same for TOML, comments kept: our entries stand between marks, and those of
# others that would win over them become comments.  Python reads TOML since 3.11
# only, so a text is cut into its statements here.

TOML_BEGIN, TOML_END, TOML_ASIDE = "# ccproxy begin", "# ccproxy end", "# ccproxy set aside: "
TOML_TOKEN = re.compile(r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|'
                        r"'[^'\n]*'|#[^\n]*|[^\"'#\[\]{}\n]+|.", re.S)
TOML_KEY = r"""(?:[A-Za-z0-9_-]+|"(?:\\.|[^"\\\n])*"|'[^'\n]*')"""
TOML_NAME = r"[ \t]*(%s(?:[ \t]*\.[ \t]*%s)*)[ \t]*" % (TOML_KEY, TOML_KEY)
TOML_STATEMENT = re.compile(        # a table's head; an entry; neither
    r"[ \t]*\[{1,2}%s\]{1,2}[ \t]*(?:#.*)?\r?\n|%s=[ \t]*(\"[^\"\\\n]*\"|'[^'\n]*'|\S)|"
    r"[ \t]*(?:#.*)?\r?\n" % (TOML_NAME, TOML_NAME))
TOML_NESTING = {"[": 1, "{": 1, "]": -1, "}": -1, '"': 1, "'": 1}    # a quote: one never closed


class Statement(NamedTuple):
    """One statement of a TOML text, in whole lines."""

    name: Path              # of an entry with its table's; () for neither an entry nor a table
    value: str              # of an entry: a string of one line, or how another value begins
    text: str


def toml_name(written: str) -> Path:
    """A dotted name's parts, without their quotes."""
    return tuple(part.strip("\"'") for part in re.findall(TOML_KEY, written))


def toml_statements(text: str, path: str) -> Iterator[Statement]:
    """All statements of a TOML text, whose values are not checked.  Raises ProxyError `config`."""
    if not text.endswith("\n"):
        text += "\n"
    table: Path = ()
    depth = start = 0
    for token in TOML_TOKEN.finditer(text):
        depth += TOML_NESTING.get(token[0], 0)
        if token[0] != "\n" or depth:
            continue
        found = TOML_STATEMENT.match(text, start)
        if not found:
            break
        table = toml_name(found[1]) if found[1] else table
        name = table + toml_name(found[2] or "") if found[1] or found[2] else ()
        yield Statement(name, found[3] or "", text[start:token.end()])
        start = token.end()
    if start < len(text):
        raise ProxyError("config", "%s: is not TOML: line %d" % (
            path, text.count("\n", 0, start) + 1))


def check_toml(text: str, path: str) -> Json:
    """Read a TOML text; {} where this Python cannot.  Raises ProxyError `config`."""
    try:
        import tomllib
    except ImportError:         # before 3.11
        return {}
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProxyError("config", "%s: is not TOML: %s" % (path, error)) from None


def foreign_statements(text: str, paths: Collection[Path],
                       path: str) -> Iterator[Tuple[Statement, bool]]:
    """All statements but our own, and whether each would win over ours.  Another program may have
    put its own between our marks.  Raises ProxyError `config`."""
    inside = False
    for statement in toml_statements(text, path):
        if statement.text.startswith((TOML_BEGIN, TOML_END)):
            inside = statement.text.startswith(TOML_BEGIN)
            continue
        wins = any(statement.name[:len(place)] == place for place in paths)
        if not (inside and wins):
            yield statement, wins


def restore_toml(text: str, before: str, paths: Collection[Path], path: str) -> str:
    """A text without our entries and with those of others again; the text before where nothing
    else has changed.  Raises ProxyError `config`."""
    text = "".join(statement.text.removeprefix(TOML_ASIDE)
                   for statement, _ in foreign_statements(text, paths, path))
    return before if text.rstrip() == before.rstrip() else text


def toml_block(head: List[str], rows: Mapping[str, Any]) -> str:
    lines = ["%s = %s" % (name, json.dumps(value)) for name, value in rows.items()
             if value is not ENTRY_GONE]
    return "\n".join([TOML_BEGIN, *head, *lines, TOML_END, ""])


def edit_toml(text: str, entries: Mapping[Path, Any], path: str) -> str:
    """A TOML text with these entries: plain ones above its tables, the last, a table, behind them.
    Raises ProxyError `config`."""
    *plain, (table, rows) = entries.items()
    pieces = [toml_block([], {place[0]: value for place, value in plain})]
    for statement, wins in foreign_statements(text.replace("\r\n", "\n"), entries, path):
        if statement.name == table[:-1] and statement.value:
            raise ProxyError("config", "%s: %s is written on one line; write it as tables first"
                             % (path, ".".join(statement.name)))
        pieces += [TOML_ASIDE + line + "\n" for line in statement.text[:-1].split("\n")] \
            if wins else [statement.text]
    whole = "".join(pieces) + toml_block(["[%s]" % ".".join(table)], rows)
    check_toml(whole, path)
    return whole.replace("\n", "\r\n") if "\r\n" in text else whole


# === DIAGNOSES (pure) =======================================================
# What the doctor says of what it found: certificates, clocks, accounts, and the
# settings of clients.  A finding never quotes a value that may be a secret: of
# an address it shows host and port, of a key its name.

CLOCK_SKEW_SECONDS = 60.0       # beyond this, TLS, OAuth and usage windows go wrong
LIVE_PLANS = ("active", "trialing", "past_due", "")     # as the vendor's client counts them
VALIDITY = re.compile(rb"[\x17\x18][\x0d\x0f][0-9]+Z[\x17\x18][\x0d\x0f]([0-9]+Z)")
ISSUER_NAME = re.compile(rb"\x55\x04([\x03\x0a])[\x0c-\x1e]\x81?(.)", re.S)  # CN, O; the length
INTERCEPTORS = re.compile(
    r"zscaler|netskope|forti(net|gate)|palo ?alto|blue ?coat|symantec|sophos|kaspersky|\beset\b"
    r"|avast|\bavg\b|bitdefender|mitmproxy|charles proxy|fiddler|portswigger|umbrella|mcafee"
    r"|skyhigh|forcepoint|websense|check ?point|barracuda|watchguard|sonicwall|untangle|squid"
    r"|cato networks|gateway ca|securly|goguardian|iboss|lightspeed|contentkeeper|dr\.?web"
    r"|inspection|intercept", re.I)
COMPANY_ADVICE = ("If your company or a virus scanner inspects TLS, save its root certificate as a "
                  "PEM file and name that in SSL_CERT_FILE; else somebody is in between")

# What to do, by OpenSSL's code of what is wrong with a certificate; else COMPANY_ADVICE.
VERIFY_ADVICE = {
    9: "Check this machine's clock", 10: "Check this machine's clock; if it is right, the "
    "upstream must renew its certificate",
    20: COMPANY_ADVICE + " (or the system's authorities are missing: install ca-certificates; "
    "python.org's Python on macOS: run Install Certificates.command)",
    **dict.fromkeys((62, 64), "Something else answers in its place: check apiBase, the hosts file "
                    "and the proxy")}

# Variables that say where a client sends its requests, and those that hold its key.
ADDRESS_VARIABLES = (
    ("ANTHROPIC_BASE_URL", "", ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")),
    ("ANTHROPIC_API_BASE", "", ("ANTHROPIC_API_KEY",)),
    ("OPENAI_BASE_URL", "/v1", ("OPENAI_API_KEY",)),
    ("OPENAI_API_BASE", "/v1", ("OPENAI_API_KEY",)),
    ("AIDER_OPENAI_API_BASE", "/v1", ("AIDER_OPENAI_API_KEY",)))


class Finding(NamedTuple):
    """One line of the doctor: whether all is well (None: unknown, or it does not apply), what was
    found, and what to do."""

    works: Optional[bool]
    words: str
    advice: str = ""


class Certificate(NamedTuple):
    """What is shown of a certificate; `until` is an epoch second."""

    issuer: str
    until: float


def read_certificate(der: bytes) -> Certificate:
    """Issuer and end of a certificate (RFC 5280 4.1), also of one that is not trusted: Python's own
    reader tells nothing of these.  What is not understood is told as unknown."""
    from datetime import datetime, timezone
    validity = VALIDITY.search(der)         # behind the issuer's names, before the subject's
    if validity is None or len(der) != 4 + int.from_bytes(der[2:4], "big"):
        return Certificate("somebody unknown", 0.0)
    names = {found[1]: der[found.end():found.end() + found[2][0]].decode("utf-8", "replace")
             for found in ISSUER_NAME.finditer(der, 0, validity.start())}
    issuer = ", ".join(filter(None, map(names.get, (b"\x03", b"\x0a"))))
    moment = validity[1].decode()
    try:
        end = datetime.strptime(moment, "%y%m%d%H%M%SZ" if len(moment) == 13 else "%Y%m%d%H%M%SZ")
    except ValueError:
        return Certificate("somebody unknown", 0.0)
    return Certificate(printable(issuer or "nobody", 100),
                       end.replace(tzinfo=timezone.utc).timestamp())


def certificate_finding(certificate: Certificate, now: float) -> Finding:
    """A certificate that is trusted: whose it is, and whether that reads along."""
    days = int((certificate.until - now) // DAY_SECONDS)
    words = "issued by %s, %s left" % (certificate.issuer, counted(days, "day"))
    if INTERCEPTORS.search(certificate.issuer):
        words += "; this is an inspection in between: whoever runs it can read keys and prompts"
    return Finding(True, words)


def clock_finding(date: str, now: float) -> Finding:
    """This machine's clock against a Date header."""
    from email.utils import parsedate_to_datetime
    try:
        skew = now - parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return Finding(None, "the upstream told no time")
    words = "%s %s the upstream's" % (short_span(abs(skew)), "behind" if skew < 0 else "ahead of")
    if abs(skew) > CLOCK_SKEW_SECONDS:
        return Finding(False, "this machine's clock is " + words,
                       "Set it (timedatectl set-ntp true, or the system's settings)")
    return Finding(True, words if abs(skew) >= 2 else "right")


def plan_finding(shown: str, figures: Figures, now: float) -> Finding:
    """An account's plan and what is left of its credit."""
    words = "%s: %s" % (shown, figures.plan or "no subscription")
    words += ", " + figures.status if figures.status else ""
    words += ", %s USD left" % dollars(figures.balance) if figures.known else ""
    if figures.period_end and figures.period_end > now:
        words += ", period ends in " + short_span(figures.period_end - now)
    if figures.status not in LIVE_PLANS:
        return Finding(False, words, "Renew it at commandcode.ai")
    if figures.known and figures.balance <= 0:
        return Finding(False, words, "Buy credit at commandcode.ai, or wait for the next period")
    return Finding(True, words)


def window_finding(shown: str, figures: Figures, now: float) -> Finding:
    """An account's usage windows."""
    words, waits = [], []
    for name, window in (("5-hour", figures.five_hour), ("weekly", figures.weekly)):
        if window is None:
            continue
        reset = ", resets in " + short_span(window.resets - now) if window.resets > now else ""
        words.append("%s %s of %s USD%s" % (name, dollars(window.used), dollars(window.cap), reset))
        waits += ["%s window%s" % (name, reset)] if window.exceeded else []
    if not words:
        return Finding(None, shown + ": no usage windows are told")
    text = "%s: %s" % (shown, "; ".join(words))
    return Finding(False, text, "Used up: wait (%s), or use another key" % "; ".join(waits)) \
        if waits else Finding(True, text)


def origin_of(url: str) -> Optional[Origin]:
    """The origin of an address that a person wrote, None for what is none."""
    try:
        return parse_origin(url.strip())
    except ValueError:
        return None


def shown_address(url: str) -> str:
    """Scheme, host and port of an address alone: its other parts may hold a secret."""
    origin = origin_of(url)
    return "no http(s) address" if origin is None else printable(
        "%s://%s" % (origin.scheme, origin.authority), 100)


def points_here(url: str, config: Config) -> bool:
    """Whether an address is where this proxy listens, or will."""
    origin = origin_of(url)
    return origin is not None and origin.port == config.port and (
        LOOPBACK.fullmatch(origin.host) is not None or origin.host == config.host)


def is_loopback_address(url: str) -> bool:
    origin = origin_of(url)
    return origin is not None and LOOPBACK.fullmatch(origin.host) is not None


def environment_findings(environment: Mapping[str, str], place: str, config: Config,
                         leads_here: Callable[[str], bool]) -> List[Finding]:
    """What variables of clients say, found at a place (`the environment` or a file); `leads_here`
    tells whether an address is this proxy's."""
    findings = []
    for name, path, keys in ADDRESS_VARIABLES:
        value = environment.get(name, "")
        if value and not leads_here(value):
            findings.append(Finding(
                False, "%s in %s is %s" % (name, place, shown_address(value)),
                "Set it to %s%s, or remove it" % (local_address(config.host, config.port), path)))
            continue
        wrong = [one for one in keys if value and environment.get(one)
                 and (not KEY_PATTERN.search(environment[one]) or mistaken_key(environment[one]))
                 and not is_same_secret(environment[one], config.client_key)]
        if wrong:
            kind = mistaken_key(environment[wrong[0]])
            findings.append(Finding(False, "%s in %s is no Command Code key%s, and %s points here"
                                    % (wrong[0], place, kind and " but " + kind, name),
                                    "Set it to your user_... key"))
        elif value:
            findings.append(Finding(True, "%s in %s points here" % (name, place)))
    if environment.get("ANTHROPIC_API_KEY") and environment.get("ANTHROPIC_AUTH_TOKEN"):
        findings.append(Finding(False, "ANTHROPIC_API_KEY and ANTHROPIC_AUTH_TOKEN in %s "
                                "contradict each other" % place, "Unset one of them"))
    return findings


def codex_finding(text: str, environment: Mapping[str, str], config: Config,
                  leads_here: Callable[[str], bool]) -> Finding:
    """What Codex' configuration says of where it sends its requests."""
    try:
        found = {one.name: one.value.strip("\"'") for one in toml_statements(
            text, "codex's config.toml")}
    except ProxyError as error:
        return Finding(False, error.message, "Mend it: codex does not read it either")
    name = found.get(("model_provider",), "openai")
    base = found.get(("model_providers", name, "base_url"), "")
    variable = found.get(("model_providers", name, "env_key"), "")
    words = "codex uses its provider " + printable(name, 40)
    if not is_loopback_address(base):
        return Finding(None, words + (", at " + shown_address(base) if base else ""))
    if not leads_here(base):
        return Finding(False, "%s, at %s" % (words, shown_address(base)),
                       "Set its base_url to %s/v1 in config.toml" % local_address(
                           config.host, config.port))
    if variable and not environment.get(variable):
        return Finding(False, "%s, whose env_key %s is not set" % (words, printable(variable, 40)),
                       "Set it to your user_... key")
    return Finding(True, words + ", which points here")


# === SERVICE UNITS (pure) ===================================================
# What keeps the proxy running on each platform: the file that its service
# manager reads, and the steps of each action.  Steps are data, so that --dry-run
# shows exactly what would be done.  No secret is ever in them.

SERVICE_NAME = "ccproxy"
LAUNCHD_LABEL = "local.ccproxy"
SERVICE_MARK = "Written by `ccproxy.py service install`, which writes it anew; not to be edited."
SERVICE_ACTIONS = ("install", "uninstall", "status", "logs", "restart")
NO_NAMESPACES = (217, 218, 226)     # systemd's exit statuses where the kernel refuses those
TEMPORARY = ("/tmp/", "/var/tmp/")  # what PrivateTmp hides
NAMESPACE_RULES = ("ProtectSystem=", "ProtectHome=", "ReadWritePaths=", "PrivateTmp=",
                   "PrivateUsers=")


class Service(NamedTuple):
    """What is to be kept running, all paths absolute."""

    command: Tuple[str, ...]            # interpreter, program, arguments
    folder: str                         # where the service manager looks for its file
    environment_file: str               # of the person's own, for what should not be in config.json
    writes: Tuple[str, ...] = ()        # folders in which the configuration lets it write
    stop_seconds: float = 30.0          # how long it may take to stop
    log_file: str = ""                  # where launchd puts what it prints
    user: int = 0                       # launchd's domain
    base: str = ""                      # where it will answer; "" where that is not known
    account: str = ""                   # in a unit of the system's manager: its line about it


class Step(NamedTuple):
    """One thing to do: `write` text to words[0], `remove` it, `run` a command, or `tell`."""

    kind: str
    words: Tuple[str, ...] = ()
    text: str = ""
    tolerant: bool = False              # whether to go on when the command fails


def systemd_word(word: str, dollars_too: bool = True) -> str:
    """A word of a unit file: specifiers and variables taken for what they are, quoted where it must
    be (systemd.syntax(7), systemd.service(5)).  In the program's own path a $ means nothing."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    word = word.replace("$", "$$") if dollars_too else word
    word = re.sub(r"[\x00-\x1f\x7f]", lambda found: "\\x%02x" % ord(found[0]), word)
    return word if re.fullmatch(r"[^\s\"'\\;#]+", word) else '"%s"' % word


def unit_text(service: Service, namespaces: bool = True) -> str:
    """The systemd unit.  Only what works in a user's too: that manager has no privileges, so mounts
    need PrivateUsers, and where the kernel refuses that, `namespaces` False leaves them out."""
    program, *arguments = service.command
    account = [service.account, "StateDirectory=ccproxy", "Environment=XDG_STATE_HOME=%S"]
    # No MemoryDenyWriteExecute: ctypes makes a callback when it is imported (before 3.12), and
    # that needs such memory; it is how libzstd is reached.
    lines = [
        "# " + SERVICE_MARK, "[Unit]", "Description=ccproxy, Command Code for any client", "",
        "[Service]", "Type=exec", *account * bool(service.account),
        "ExecStart=" + " ".join([systemd_word(program, False), *map(systemd_word, arguments)]),
        "ExecReload=/bin/kill -HUP $MAINPID",
        "EnvironmentFile=-" + service.environment_file.replace("%", "%%"),
        "Restart=on-failure", "RestartSec=3",
        "RestartPreventExitStatus=2",           # a wrong configuration does not mend itself
        "KillSignal=SIGTERM", "KillMode=mixed",  # npm, a child, is ours to end
        "TimeoutStopSec=%d" % (service.stop_seconds + 15), "UMask=0077", "NoNewPrivileges=yes",
        "LockPersonality=yes", "SystemCallArchitectures=native", "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes", "RestrictNamespaces=yes",
        "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK",  # the last: getaddrinfo's
        "PrivateUsers=yes", "ProtectSystem=strict", "ProtectHome=read-only",
        *("ReadWritePaths=" + systemd_word("-" + path, False) for path in service.writes),
        "PrivateTmp=yes", "", "[Install]",
        "WantedBy=%s.target" % ("default", "multi-user")[bool(service.account)], ""]
    used = [*service.command, *service.writes]
    left_out = () if namespaces else NAMESPACE_RULES
    if namespaces and any((path + "/").startswith(TEMPORARY) for path in used):
        left_out = ("PrivateTmp=",)
    return "\n".join(line for line in lines if not line.startswith(left_out))


def plist_text(service: Service) -> str:
    """The launchd agent's property list."""
    import plistlib
    entries = {"Label": LAUNCHD_LABEL, "ProgramArguments": list(service.command),
               "RunAtLoad": True, "KeepAlive": {"SuccessfulExit": False}, "ThrottleInterval": 5,
               "ExitTimeOut": int(service.stop_seconds + 15), "Umask": 0o077,
               "StandardOutPath": service.log_file, "StandardErrorPath": service.log_file}
    text = plistlib.dumps(entries).decode("utf-8")
    return text.replace("<plist ", "<!-- %s -->\n<plist " % SERVICE_MARK, 1)


def windows_word(word: str) -> str:
    """A word of a command line as programs of Windows take one apart: backslashes count double
    before a quote alone."""
    word = re.sub(r'(\\*)"', r'\1\1\\"', word)
    if word and not re.search(r"\s", word):
        return word
    return '"%s"' % re.sub(r"(\\+)$", r"\1\1", word)


def windows_line(words: Iterable[str]) -> str:
    return " ".join(map(windows_word, words))


def manager_step(service: Service, program: str, *words: str, tolerant: bool = False) -> Step:
    return Step("run", (program, *["--user"] * (not service.account), *words), tolerant=tolerant)


def systemd_steps(service: Service, action: str, rest: Tuple[str, ...]) -> List[Step]:
    """What an action does where systemd runs."""
    unit = SERVICE_NAME + ".service"
    path = service.folder + "/" + unit
    run = partial(manager_step, service, "systemctl")
    lasts = "It starts " + ("with this machine" if service.account else
                            "when you log in; to have it run without that: loginctl enable-linger")
    steps = {
        "install": [Step("write", (path,), unit_text(service)), run("daemon-reload"),
                    run("enable", unit), run("restart", unit), Step("tell", text=lasts)],
        "uninstall": [run("disable", "--now", unit, tolerant=True), Step("remove", (path,)),
                      run("daemon-reload")],
        "status": [run("status", "--no-pager", unit, *rest)],
        "logs": [manager_step(service, "journalctl", "--no-pager", "-u", unit,
                              *(rest or ("-n", "100")))],
        "restart": [run("restart", unit)]}
    return steps[action]


def launchd_steps(service: Service, action: str, rest: Tuple[str, ...]) -> List[Step]:
    """What an action does on macOS."""
    path = "%s/%s.plist" % (service.folder, LAUNCHD_LABEL)
    domain = "gui/%d" % service.user
    name = domain + "/" + LAUNCHD_LABEL
    bootout = Step("run", ("launchctl", "bootout", name), tolerant=True)
    steps = {
        "install": [Step("write", (path,), plist_text(service)), bootout,
                    Step("run", ("launchctl", "bootstrap", domain, path))],
        "uninstall": [bootout, Step("remove", (path,))],
        "status": [Step("run", ("launchctl", "print", name, *rest))],
        "logs": [Step("run", ("tail", *(rest or ("-n", "100")), service.log_file))],
        "restart": [Step("run", ("launchctl", "kickstart", "-k", name))]}
    return steps[action]


def windows_steps(service: Service, action: str, rest: Tuple[str, ...]) -> List[Step]:
    """What is to be typed on Windows (in cmd.exe), where nothing is done unasked."""
    if action == "logs":
        return [Step("tell", text="Set logFile: that file is the log.")]
    program, *arguments = service.command
    program = re.sub(r"(?i)python\.exe$", "pythonw.exe", program)       # no window
    lines = {
        "install": [("schtasks", "/Create", "/F", "/TN", SERVICE_NAME, "/SC", "ONLOGON", "/RL",
                     "LIMITED", "/TR", windows_line([program, *arguments])),
                    ("schtasks", "/Run", "/TN", SERVICE_NAME)],
        "uninstall": [("schtasks", "/End", "/TN", SERVICE_NAME),
                      ("schtasks", "/Delete", "/F", "/TN", SERVICE_NAME)],
        "status": [("schtasks", "/Query", "/V", "/FO", "LIST", "/TN", SERVICE_NAME)],
        "restart": [("schtasks", "/End", "/TN", SERVICE_NAME),
                    ("schtasks", "/Run", "/TN", SERVICE_NAME)]}
    return [Step("tell", text="In cmd.exe, type:\n" + "\n".join(map(windows_line, lines[action])))]


SERVICE_MANAGERS: Dict[str, Callable[[Service, str, Tuple[str, ...]], List[Step]]] = {
    "systemd": systemd_steps, "launchd": launchd_steps, "windows": windows_steps}


def step_text(step: Step) -> str:
    """What --dry-run shows of a step."""
    import shlex
    if step.kind == "write":
        return "write %s:\n%s\n" % (step.words[0], step.text)
    if step.kind == "tell":
        return step.text + "\n"
    return "%s %s\n" % (step.kind, shlex.join(step.words))


# === CLIENTS SET UP (pure) ==================================================
# Which entries of a client's own settings lead it here, and how they are made
# and taken out again.  None holds a key: each names the variable that does.

CLAUDE_NAMES = ("ANTHROPIC_BASE_URL", "ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_OPUS_MODEL",
                "ANTHROPIC_DEFAULT_SONNET_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL",
                "ANTHROPIC_DEFAULT_FABLE_MODEL", "CLAUDE_CODE_MAX_CONTEXT_TOKENS")
CODEX_PATHS: Tuple[Path, ...] = (("model",), ("model_provider",), ("model_context_window",),
                                 ("model_providers", "ccproxy"))
OPENCODE_PATHS: Tuple[Path, ...] = (("model",), ("small_model",), ("provider", "ccproxy"))
# A command of POSIX sh.  It asks the proxy only as a child of Claude Code, which sets the address;
# the key is in no command line.  Where curl is missing or slow, the key counts as good.
KEY_HELPER = """\
case "$KEY" in ""|*...*) echo "KEY holds no keyAGAIN" >&2; exit 1;; esac; \
if [ "$ANTHROPIC_BASE_URL" ]; then said=$(printf "Authorization: Bearer %s" "$KEY" | { \
curl -q -s -m 4 --noproxy 127.0.0.1,localhost -H @- -w '"state":"%{http_code}"' \
"$ANTHROPIC_BASE_URL/v1/usage"; } 2>/dev/null); case $? in 6|7) echo "no proxy answers at \
$ANTHROPIC_BASE_URL: start ccproxy there, then start claude again" >&2; exit 1;; esac; \
case "$(printf %s "$said" | grep -o '"state":"[a-z0-9]*"' | sort -u | tr -d '"\\n')" in \
state:401*|state:200state:refused) echo "KEY holds a key that is refused (commandcode.ai, \
settings, API keys shows yours)AGAIN" >&2; exit 1;; esac; case "$said" in *'"unreachable":true'*) \
echo "the proxy reaches no upstream: ccproxy.py doctor looks for the cause" >&2; exit 1;; esac; \
fi; \
printf "%s\\n" "$KEY"\
"""


def key_helper(windows: bool, needed: bool = True) -> str:
    """The command by which Claude Code gets the key; it runs in the system's own shell.  Where one
    is needed and there is none, or the proxy calls it refused, it fails: Claude Code shows why at
    once, while it repeats a request that gets a 401, or no answer, for minutes without a word."""
    if not needed:
        return "echo %%%s%%" % KEY_VARIABLE if windows else 'echo "${%s:-%s}"' % (
            KEY_VARIABLE, NO_KEY)
    again = ": %s %s=user_..., then start claude again" % (
        "set" if windows else "export", KEY_VARIABLE)
    if windows:
        return "if not defined %s (echo %s holds no key%s>&2& exit 1) else echo %%%s%%" % (
            KEY_VARIABLE, KEY_VARIABLE, again, KEY_VARIABLE)
    return KEY_HELPER.replace("KEY", KEY_VARIABLE).replace("AGAIN", again)


def claude_foreign(settings: Json) -> List[Path]:
    """Entries of its settings that would win over ours."""
    return [("env", name) for name in foreign_names(CLIENTS["claude"],
                                                    inner_object(settings, "env"))]


def claude_entries(settings: Json, target: Target, windows: bool) -> Dict[Path, Any]:
    """Claude Code asks a helper for the key, which no login overrules."""
    entries: Dict[Path, Any] = dict.fromkeys(claude_foreign(settings), ENTRY_GONE)
    entries.update({("env", name): value for name, value in claude_models(target).items()})
    return {**entries, ("apiKeyHelper",): key_helper(windows, target.key != NO_KEY)}


def claude_paths(before: Json) -> List[Path]:
    return [*claude_foreign(before), *[("env", name) for name in CLAUDE_NAMES], ("apiKeyHelper",)]


def entries_at(build: Callable[[Target], Json], paths: Collection[Path]
               ) -> Callable[[Json, Target, bool], Dict[Path, Any]]:
    """Entries that are the same whatever the settings hold."""
    return lambda settings, target, windows: {path: entry_at(build(target), path)
                                              for path in paths}


class SetUp(NamedTuple):
    """How one client's settings are edited and restored.  A variable names their folder, or one
    that holds it; without it, it is in the person's home."""

    load: Callable[[str, str], Json]
    entries: Callable[[Json, Target, bool], Dict[Path, Any]]
    edit: Callable[[str, Mapping[Path, Any], str], str]
    restore: Callable[[str, str, Collection[Path], str], str]
    paths: Callable[[Json], Collection[Path]]       # of what is restored, by the settings before
    variable: str
    inside: str                     # of the folder that the variable names
    home: str
    files: Tuple[str, ...]          # the last that there is wins


SET_UPS: Dict[str, SetUp] = {
    "claude": SetUp(load_object, claude_entries, edit_json, restore_json, claude_paths,
                    "CLAUDE_CONFIG_DIR", "", "~/.claude", ("settings.json",)),
    "codex": SetUp(check_toml, entries_at(codex_entries, CODEX_PATHS), edit_toml, restore_toml,
                   lambda _: CODEX_PATHS, "CODEX_HOME", "", "~/.codex", ("config.toml",)),
    "opencode": SetUp(load_object, entries_at(opencode_entries, OPENCODE_PATHS), edit_json,
                      restore_json, lambda _: OPENCODE_PATHS, "XDG_CONFIG_HOME", "opencode",
                      "~/.config/opencode", ("opencode.json", "opencode.jsonc"))}


def change_lines(entries: Mapping[Path, Any]) -> List[str]:
    """What is set and what is taken away, of the latter only the name."""
    return ["- " + ".".join(path) if value is ENTRY_GONE else "+ %s = %s" % (
        ".".join(path), json.dumps(value)) for path, value in entries.items()]


# === DEMO ANSWERS (pure) ====================================================
# What the upstream inside the program (--demo) says, in Command Code's own
# format: a person can connect any client without a key, and a client's author
# can try every error.  Markers in the last user message choose: [demo:402],
# [demo:429], [demo:503], [demo:length], [demo:error], [demo:cut], [demo:slow],
# [demo:parallel], [demo:call NAME].

DEMO_KEY = "user_demo"
DEMO_LENGTH, DEMO_ITEMS, DEMO_DEPTH = 200, 5, 8     # bounds of what a schema can make it write
DEMO_MARKER = re.compile(r"\[demo:([a-z0-9]+)\]")
DEMO_CALL = re.compile(r"\[demo:call ([^\]]+)\]")
DEMO_ERRORS = {
    "400": (400, "BAD_REQUEST", "Invalid request error (asked for by [demo:400])."),
    "402": (402, "INSUFFICIENT_CREDITS", "Insufficient credits (asked for by [demo:402])."),
    "401": (401, "UNAUTHORIZED", "Bad key (asked for by [demo:401])."),
    "404": (404, "NOT_FOUND", "Not there (asked for by [demo:404])."),
    "413": (413, "TOO_LARGE", "Too large (asked for by [demo:413])."),
    "529": (529, "OVERLOADED", "Overloaded (asked for by [demo:529])."),
    "403": (403, "MODEL_NOT_IN_PLAN", "This model needs a higher plan ([demo:403])."),
    "429": (429, "RATE_LIMITED", "Too many requests (asked for by [demo:429])."),
    "500": (500, "INTERNAL", "Something broke (asked for by [demo:500])."),
    "503": (503, "UNAVAILABLE", "No capacity (asked for by [demo:503]).")}
DANGEROUS_TOOL = re.compile(    # a demo must not make an agent change anything unasked
    r"bash|shell|exec|command|cmd|terminal|run|write|edit|patch|replace|insert|create|delete"
    r"|remove|move|rename|install|commit|push|send|update|set|task|agent|kill", re.I)


class DemoAnswer(NamedTuple):
    """A status with a JSON body, or the lines of a stream with a pause in seconds before each."""

    status: int
    body: Json
    lines: List[Tuple[float, Json]]
    cut: bool = False           # the connection ends in mid-stream


def number_of(schema: Json, word: str, otherwise: float) -> float:
    value = schema.get(word)
    return value if is_number(value, int, float) else otherwise


def example_number(schema: Json, root: Any, depth: int) -> Any:
    """A number within the bounds of a schema."""
    least = max(number_of(schema, "minimum", 1), number_of(schema, "exclusiveMinimum", 0) + 1)
    most = min(number_of(schema, "maximum", least),
               number_of(schema, "exclusiveMaximum", least + 1) - 1)
    value = min(least, most)
    return int(value) if schema.get("type") == "integer" else value


def example_string(schema: Json, root: Any, depth: int) -> str:
    least = min(int(number_of(schema, "minLength", 0)), DEMO_LENGTH)
    most = int(number_of(schema, "maxLength", DEMO_LENGTH))
    return "example".ljust(least, "x")[:most]


def example_array(schema: Json, root: Any, depth: int) -> List[Any]:
    count = min(max(1, int(number_of(schema, "minItems", 1))), DEMO_ITEMS,
                int(number_of(schema, "maxItems", DEMO_ITEMS)))
    return [example_value(schema.get("items"), root, depth + 1) for _ in range(count)]


def example_object(schema: Json, root: Any, depth: int) -> Json:
    """The required members, or all where none is."""
    members = object_in(schema, "properties")
    return {name: example_value(members.get(name), root, depth + 1)
            for name in list_in(schema, "required") or members if isinstance(name, str)}


EXAMPLES: Dict[str, Callable[[Json, Any, int], Any]] = {
    "object": example_object, "array": example_array, "string": example_string,
    "integer": example_number, "number": example_number,
    "boolean": lambda schema, root, depth: True, "null": lambda schema, root, depth: None}


def plain_schema(schema: Json, root: Any) -> Json:
    """A schema with its reference resolved and its first alternative taken."""
    if "$ref" in schema:
        found = resolve_reference(schema["$ref"], root)
        return found if isinstance(found, dict) else {}
    for keyword in BRANCHES:
        options = list_in(schema, keyword)
        if options:
            rest = {name: value for name, value in schema.items() if name != keyword}
            return {**rest, **options[0]} if isinstance(options[0], dict) else rest
    return schema


def example_value(schema: Any, root: Any, depth: int = 0) -> Any:
    """A value that is valid under an ordinary schema: what the demo's calls and JSON hold."""
    for _ in range(DEMO_DEPTH):
        plain = plain_schema(schema, root) if isinstance(schema, dict) else {}
        if plain is schema:
            break
        schema = plain
    if "const" in schema:
        return schema["const"]
    if list_in(schema, "enum"):
        return schema["enum"][0]
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if depth > DEMO_DEPTH or not isinstance(kind, str):
        return "example"
    return EXAMPLES.get(kind, example_string)({**schema, "type": kind}, root, depth)


def example_input(schema: Any) -> Json:
    """Arguments for a tool: always an object."""
    value = example_value(schema, schema)
    return value if isinstance(value, dict) else {}


def last_user_text(messages: List[Json]) -> str:
    for message in reversed(messages):
        if message["role"] == "user":
            return "\n".join(part.get("text", "") for part in message["content"])
    return ""


def without_reminders(messages: List[Json]) -> List[Json]:
    """What user and tools said last is answered, not a system message behind it."""
    said = [{**message, "content": [part for part in message["content"] if not part.get(
        "text", "").startswith("<system-reminder>")]} for message in messages]
    return [message for message in said if message["content"]] or messages


def demo_tools(params: Json, asked: str) -> List[Json]:
    """The tools that the demo calls: only those that a marker or tool_choice asks for.  Where
    none is named, a harmless one is preferred, and [demo:parallel] calls no other."""
    if params["messages"][-1]["role"] == "tool":
        return []
    choice, tools = params.get("tool_choice") or {}, params["tools"]
    names = DEMO_CALL.findall(asked) + [choice.get("name")]
    parallel = "[demo:parallel]" in asked
    harmless = [tool for tool in tools if not DANGEROUS_TOOL.search(tool["name"])]
    called = [tool for tool in tools if tool["name"] in names]
    if not called and choice.get("type") == "any":
        called = harmless or tools
    elif not called and parallel:
        called = harmless
    return called[:2] if parallel else called[:1]


def demo_schema(system: str) -> Any:
    """The schema that the system text asks an answer to follow, None when there is none."""
    found = re.search(r"JSON Schema and nothing else.*?\n(\{.*)", system, re.S)
    try:
        return json.loads(found[1]) if found else None
    except (ValueError, RecursionError):
        return None


def demo_words(params: Json, asked: str) -> List[str]:
    """The text of an answer, a word or so at a time.  It repeats nothing of the request: an agent
    may act on what it reads (aider writes a file that it finds in an answer)."""
    system = params["system"] if isinstance(params["system"], str) else "".join(
        block["text"] for block in params["system"])
    schema = demo_schema(system)
    if schema is not None:
        return [json.dumps(example_value(schema, schema), ensure_ascii=False)]
    if JSON_ANY in system:
        return ['{"demo": true}']
    images = sum(part["type"] == "image" for message in params["messages"]
                 for part in message["content"])
    results = [part["output"]["value"] for message in params["messages"][-1:]
               if message["role"] == "tool" for part in message["content"]]
    words = "This is the demo of ccproxy, not a model: nobody has read your request. "
    if images:
        words += "It holds %s. " % counted(images, "picture")
    words += "The tool answered %s." % counted(sum(map(len, results)), "character") if results \
        else "Your last message holds %s." % counted(len(asked.strip()), "character")
    return re.findall(r"\S+\s*", words + " Grüße, 世界 🚀.")


def demo_stream(params: Json, asked: str) -> List[Tuple[float, Json]]:
    """All events of an ordinary answer up to its finish."""
    marker = DEMO_MARKER.findall(asked)
    pause = 0.5 if "slow" in marker else 0.003
    lines: List[Tuple[float, Json]] = [(0.0, {"type": "start"})]
    for word in ("The demo ", "thinks ", "a little."):
        lines.append((pause, {"type": "reasoning-delta", "id": "r0", "text": word}))
    lines.append((0.0, {"type": "reasoning-end", "id": "r0"}))
    if "length" in marker:
        return lines + [(pause, {"type": "text-delta", "id": "t0", "text": "This is the dem"})]
    calls = demo_tools(params, asked)
    for number, tool in enumerate(calls):
        name = "call_demo_%d_%d" % (len(params["messages"]), number)
        given = example_input(tool["input_schema"])
        text = json.dumps(given, ensure_ascii=False)
        lines.append((pause, {"type": "tool-input-start", "id": name, "toolName": tool["name"]}))
        lines += [(pause, {"type": "tool-input-delta", "id": name, "delta": text[at:at + 8]})
                  for at in range(0, len(text), 8)]
        lines.append((0.0, {"type": "tool-call", "toolCallId": name, "toolName": tool["name"],
                            "input": given}))
    if not calls:
        lines += [(pause, {"type": "text-delta", "id": "t0", "text": word})
                  for word in demo_words(params, asked)]
    return lines


def demo_answer(body: Json) -> DemoAnswer:
    """The demo's answer to one /alpha/generate request; its figures are estimates and say so
    nowhere else than here, for there is no model behind it."""
    params = {**body["params"], "messages": without_reminders(body["params"]["messages"])}
    asked = last_user_text(params["messages"])
    markers = DEMO_MARKER.findall(asked)
    if markers and markers[0] in DEMO_ERRORS and params["messages"][-1]["role"] == "user":
        status, code, message = DEMO_ERRORS[markers[0]]
        return DemoAnswer(status, {"success": False, "error": {
            "code": code, "status": status, "message": message}}, [])
    lines = demo_stream(params, asked)
    if "error" in markers:
        return DemoAnswer(200, {}, lines[:-2] + [(0.0, {"type": "error", "error": {
            "message": "Broken off (asked for by [demo:error]).", "statusCode": 503,
            "isRetryable": False}})])
    if "cut" in markers:
        return DemoAnswer(200, {}, lines[:-2], cut=True)
    called = any(line["type"] == "tool-call" for _, line in lines)
    reason = "length" if "length" in markers else "tool-calls" if called else "stop"
    usage = {"inputTokens": len(to_json(params)) // 4, "outputTokens": len(lines),
             "inputTokenDetails": {"cacheReadTokens": 0}, "outputTokenDetails":
             {"reasoningTokens": 3}}
    return DemoAnswer(200, {}, lines + [(0.0, {"type": "finish", "finishReason": reason,
                                               "totalUsage": usage})])


# === PART: PAGE (pure) ======================================================
# === PAGE STYLE (pure) ======================================================
# How the dashboard looks.  Colours stand once, for light and dark together;
# there are no inline styles, for the page's policy allows this sheet alone.

PAGE_STYLE = r"""
:root { color-scheme: light dark; --radius: 12px; --gap: 16px;
  --page: light-dark(#f5f6f8, #0e1014); --card: light-dark(#ffffff, #171a20);
  --raised: light-dark(#f1f3f6, #1f232b); --line: light-dark(#dfe3e9, #2b303a);
  --edge: light-dark(#868f9d, #6b7584); --text: light-dark(#1a1e26, #e8eaee);
  --dim: light-dark(#586171, #a0a9b8); --accent: light-dark(#3451c6, #93a8ff);
  --on-accent: light-dark(#ffffff, #10142a); --soft: light-dark(#e9edfd, #232b4a);
  --good: light-dark(#17733f, #5fd08f); --good-soft: light-dark(#e2f4e9, #14301f);
  --warn: light-dark(#8a5200, #f0b75e); --warn-soft: light-dark(#fcf0da, #35270f);
  --bad: light-dark(#b3261e, #ff8f86); --bad-soft: light-dark(#fdeaea, #3c1a19);
  --second: light-dark(#0b7285, #59c5d6); }
:root[data-theme="light"] { color-scheme: light; } :root[data-theme="dark"] { color-scheme: dark; }
* { box-sizing: border-box; }
html { scroll-padding-top: 72px; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Apple SD Gothic Neo",
  "Malgun Gothic", "Noto Sans KR", "PingFang SC", "Microsoft YaHei", "Noto Sans SC", sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
:lang(ko) { word-break: keep-all; }
h1, h2, h3, p, ul, dl, dd, figure { margin: 0; padding: 0; }
h2 { font-size: 20px; line-height: 1.3; letter-spacing: -0.01em; }
h3 { font-size: 14px; font-weight: 600; }
ul { list-style: none; }
a { color: var(--accent); }
code, pre, p.mono, td.mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas,
  "Liberation Mono", monospace; font-size: 13px; }
[hidden] { display: none !important; }
.away { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 6px; }
.skip { position: absolute; left: 8px; top: -60px; z-index: 9; padding: 8px 14px;
  background: var(--card); border-radius: 8px; }
.skip:focus { top: 8px; }
/* The head: what it is, how it is, and the way about. */
.top { position: sticky; top: 0; z-index: 5; background: var(--card);
  border-bottom: 1px solid var(--line); }
.bar { display: flex; align-items: center; gap: 12px; max-width: 1240px; margin: 0 auto;
  padding: 8px 20px; min-height: 56px; }
.brand { display: flex; align-items: center; gap: 8px; font-size: 16px; font-weight: 650;
  letter-spacing: -0.01em; }
.brand svg { color: var(--accent); }
.link { display: flex; align-items: center; gap: 7px; min-width: 0; }
.dot { flex: none; width: 9px; height: 9px; border-radius: 50%; background: var(--edge); }
.link[data-link="live"] .dot { background: var(--good); box-shadow: 0 0 0 3px var(--good-soft); }
.link[data-link="lost"] .dot { background: var(--bad); box-shadow: 0 0 0 3px var(--bad-soft); }
.tools { display: flex; align-items: center; gap: 6px; margin-left: auto; }
nav { max-width: 1240px; margin: 0 auto; padding: 0 12px; display: flex; gap: 4px; }
nav a { display: flex; align-items: center; gap: 7px; padding: 9px 10px 10px; color: var(--dim);
  text-decoration: none; font-weight: 500; font-size: 14px; border-bottom: 2px solid transparent; }
nav a:hover { color: var(--text); }
nav a[aria-current] { color: var(--accent); border-color: var(--accent); }
nav svg, .icon svg { width: 18px; height: 18px; fill: none; stroke: currentColor;
  stroke-width: 1.6; stroke-linecap: round; stroke-linejoin: round; }
main { max-width: 1240px; margin: 0 auto; padding: 20px 20px 48px; }
main > section { display: grid; gap: var(--gap); grid-template-columns: minmax(0, 1fr); }
.heading { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 14px; }
.heading > :last-child:not(:first-child) { margin-left: auto; }
.note, .empty { color: var(--dim); font-size: 14px; max-width: 74ch; } .empty { padding: 18px 4px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: var(--radius);
  padding: 16px; min-width: 0; }
.stack { display: grid; gap: 12px; grid-template-columns: minmax(0, 1fr); align-content: start; }
#banners:not(:empty) { margin-bottom: var(--gap); }
.grid { display: grid; gap: var(--gap); grid-template-columns: repeat(2, minmax(0, 1fr)); }
.row { display: flex; flex-wrap: wrap; align-items: center; gap: 8px; }
.dim, .link, .legend, .readout, summary, dt { color: var(--dim); }
.small, .link, .legend, .readout, summary, .tile dt { font-size: 13px; }
/* The colours of what is good, bad, the first or the second: of chips, banners and charts. */
.first, .info { --tone: var(--accent); --tint: var(--soft); }
.second { --tone: var(--second); }
.good { --tone: var(--good); --tint: var(--good-soft); }
.warn { --tone: var(--warn); --tint: var(--warn-soft); }
.bad { --tone: var(--bad); --tint: var(--bad-soft); }
/* Figures. */
.facts { display: flex; flex-wrap: wrap; gap: 4px 24px; font-size: 14px; }
.facts div { display: flex; gap: 7px; } .facts dt { flex: none; }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(6, minmax(0, 1fr)); }
.tile { padding: 12px 14px; }
.tile dd { font-size: 24px; font-weight: 620; letter-spacing: -0.02em; line-height: 1.25; }
.tile small { display: block; font-size: 12.5px; font-weight: 400; color: var(--dim);
  letter-spacing: 0; min-height: 1.5em; }
.chip { display: inline-block; padding: 1px 8px; border-radius: 99px; font-size: 12.5px;
  font-weight: 550; white-space: nowrap; background: var(--tint, var(--raised));
  color: var(--tone, var(--dim)); }
.banner { border-radius: var(--radius); padding: 11px 14px; font-size: 14px;
  background: var(--tint, var(--warn-soft)); color: var(--tone, var(--warn)); }
.banner.info { color: var(--text); }
/* Controls. */
button, select, input, textarea { font: inherit; color: inherit; }
input, select, textarea { background: var(--card); border: 1px solid var(--edge);
  border-radius: 8px; padding: 6px 10px; min-height: 36px; width: 100%; min-width: 0; }
textarea { min-height: 72px; resize: vertical; font-family: ui-monospace, Menlo, Consolas,
  monospace; font-size: 13px; }
input::placeholder { color: var(--dim); opacity: 1; }
.wrong { border-color: var(--bad); } .fault { color: var(--bad); font-size: 13px; }
button { cursor: pointer; border: 1px solid var(--line); background: var(--card);
  border-radius: 8px; padding: 6px 13px; min-height: 36px; font-weight: 550; font-size: 14px; }
button:hover:not(:disabled) { background: var(--raised); }
button:disabled, input:disabled, select:disabled, textarea:disabled { opacity: 0.6;
  cursor: not-allowed; }
button.first { background: var(--accent); border-color: var(--accent); color: var(--on-accent); }
button.first:hover:not(:disabled) { background: var(--accent); filter: brightness(1.08); }
button.danger { color: var(--bad); }
button.quiet, .tools select { border-color: transparent; background: none; color: var(--dim); }
button.quiet:hover { color: var(--text); background: var(--raised); }
button.icon { display: grid; place-items: center; width: 36px; padding: 0; color: var(--dim); }
button.text { border: 0; background: none; padding: 0; min-height: 0; text-align: left; }
.tools select { width: auto; padding: 4px; font-size: 14px; }
.tools option { background: var(--card); color: var(--text); }
.switch { appearance: none; flex: none; position: relative; width: 40px;
  height: 24px; min-height: 24px; margin: 0; padding: 0; border-radius: 99px; cursor: pointer;
  border: 1px solid var(--edge); background: var(--raised); vertical-align: middle; }
.switch::after { content: ""; position: absolute; left: 3px; top: 3px; width: 16px; height: 16px;
  border-radius: 50%; background: var(--dim); }
.switch:checked { background: var(--accent); border-color: var(--accent); }
.switch:checked::after { left: 19px; background: var(--on-accent); }
.field { display: grid; gap: 4px; font-size: 13px; color: var(--dim); min-width: 0; }
.field > :not(span) { color: var(--text); font-size: 15px; }
.narrow { width: 100%; max-width: 420px; }
.filters { display: grid; gap: 10px; grid-template-columns: 2fr repeat(4, minmax(0, 1fr)); }
#connect-form { grid-template-columns: 2fr 2fr 1fr; }
/* Tables; on a narrow page their rows are cards. */
.scroll { overflow-x: auto; margin: 0 -16px; padding: 0 16px; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th { text-align: left; font-weight: 500; color: var(--dim); font-size: 13px; white-space: nowrap;
  padding: 6px 10px; border-bottom: 1px solid var(--line); }
td { padding: 8px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
.figure { text-align: right; white-space: nowrap; } td.mono, .fixed { white-space: nowrap; }
tr.open { cursor: pointer; } tr.open:hover td { background: var(--raised); }
tr.off td { color: var(--dim); }
td.model, span.model { font-weight: 550; }
/* Charts. */
.chart figcaption { display: flex; flex-wrap: wrap; gap: 2px 12px; align-items: baseline; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 12px; margin-left: auto; }
.legend i { display: inline-block; width: 9px; height: 9px; border-radius: 3px; margin-right: 5px;
  background: var(--tone); }
.readout { min-height: 1.5em; }
.plot { display: block; width: 100%; height: 168px; touch-action: pan-y; cursor: crosshair; }
.plot text { fill: var(--dim); font-size: 11px; }
.plot .rule { stroke: var(--line); stroke-width: 1; }
.plot .cross { stroke: var(--edge); stroke-width: 1; stroke-dasharray: 3 3; }
.plot rect, .plot circle { fill: var(--tone); }
.plot path { fill: none; stroke: var(--tone); stroke-width: 2; stroke-linejoin: round;
  stroke-linecap: round; }
.plot path.area { fill: var(--accent); stroke: none; opacity: 0.13; }
summary { cursor: pointer; }
.tall { max-height: 260px; overflow: auto; }
/* Windows and credit as bars. */
.meter { height: 10px; border-radius: 99px; background: var(--raised); overflow: hidden;
  display: block; width: 100%; }
.meter rect { fill: var(--tone, var(--accent)); }
.between { display: flex; justify-content: space-between; gap: 10px; flex-wrap: wrap; }
.big { font-size: 26px; font-weight: 620; letter-spacing: -0.02em; line-height: 1.2; }
.pair { display: grid; gap: 4px 16px; grid-template-columns: max-content minmax(0, 1fr);
  font-size: 14px; }
/* Options. */
.option { display: grid; gap: 4px 24px; padding: 12px 0; border-bottom: 1px solid var(--line);
  grid-template-columns: minmax(0, 1fr) minmax(0, 340px); }
.option:last-child { border-bottom: 0; }
.savebar { position: sticky; bottom: 12px; z-index: 4; display: flex; flex-wrap: wrap;
  align-items: center; gap: 10px; box-shadow: 0 6px 24px rgb(0 0 0 / 0.18); }
.savebar > :first-child { margin-right: auto; }
pre { margin: 0; padding: 12px 14px; border-radius: 8px; background: var(--raised);
  overflow-x: auto; line-height: 1.55; white-space: pre; overflow-wrap: normal; }
dialog { border: 1px solid var(--line); border-radius: 14px; background: var(--card);
  color: var(--text); padding: 20px; width: min(560px, calc(100vw - 24px));
  max-height: calc(100dvh - 32px); overscroll-behavior: contain; }
dialog::backdrop { background: rgb(8 10 16 / 0.5); }
.toast { position: fixed; left: 50%; bottom: 20px; transform: translateX(-50%); z-index: 8;
  background: var(--text); color: var(--page); padding: 9px 16px; border-radius: 10px;
  font-size: 14px; max-width: calc(100vw - 32px); }
@media (max-width: 1020px) {
  .cards .rare { display: none; }
  .tiles { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .filters:not(#connect-form) { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .filters > :first-child { grid-column: 1 / -1; }
  #connect-form > :first-child { grid-column: auto; } }
@media (max-width: 760px) {
  .bar { padding: 6px 12px; gap: 8px; min-height: 52px; }
  .top { position: static; }
  .tools { gap: 0; }
  html { scroll-padding-top: 12px; }
  nav { position: fixed; left: 0; right: 0; bottom: 0; z-index: 6; justify-content: space-around;
    background: var(--card); border-top: 1px solid var(--line); gap: 0;
    padding: 0 2px env(safe-area-inset-bottom); }
  nav a { flex: 1 1 0; min-width: 0; flex-direction: column; gap: 2px; font-size: 11px;
    padding: 7px 0 6px; border: 0; text-align: center; }
  nav svg { width: 20px; height: 20px; }
  main { padding: 14px 12px 96px; }
  .grid, .option, #connect-form { grid-template-columns: minmax(0, 1fr); }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .tile dd { font-size: 21px; }
  .card { padding: 14px; }
  .scroll { margin: 0 -14px; padding: 0 14px; }
  .cards thead { display: none; }
  .cards, .cards tbody { display: block; }
  .cards tr { display: flex; flex-wrap: wrap; gap: 3px 10px; padding: 11px 0;
    border-bottom: 1px solid var(--line); align-items: baseline; }
  .cards tr:last-child { border-bottom: 0; }
  .cards td { border: 0; padding: 0; font-size: 13.5px; text-align: left; }
  .cards td:empty { display: none; }
  .cards td[data-label]::before { content: attr(data-label) " "; color: var(--dim); }
  .cards tr:first-child { padding-top: 0; }
  .cards td.wide { flex: 1 1 100%; font-size: 15px; order: -1; }
  .cards td.lead { order: -2; align-self: center; }
  .cards td.lead + td.wide { flex: 1 1 70%; }
  .cards td.end { margin-left: auto; }
  .savebar, .toast { bottom: 72px; } }
@media (prefers-reduced-motion: no-preference) {
  .switch::after { transition: left 0.15s; }
  .link[data-link="live"] .dot.busy { animation: pulse 1.6s ease-in-out infinite; }
  @keyframes pulse { 50% { opacity: 0.45; } } }
@media (forced-colors: active) { .switch:checked { background: Highlight; } }
"""


# === PAGE MARKUP (pure) =====================================================
# What the dashboard is made of: a shell without any data, the same for
# everybody. Texts come from PAGE WORDS by data-word; @STYLE@ and @SCRIPT@ are
# filled in once.  A form with method="dialog" is sent nowhere.

PAGE_MARKUP = r"""
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1, viewport-fit=cover">
<meta name="color-scheme" content="light dark">
<meta name="robots" content="noindex">
<title>ccproxy</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0
 16 16'%3E%3Cpath fill='%234f6bed' d='M3 1h10L8 8zM3 15h10L8 8z'/%3E%3C/svg%3E">
<style>@STYLE@</style>
</head>
<body>
<a class="skip" id="skip" href="#main" data-word="skip"></a>
<header class="top">
  <div class="bar">
    <h1 class="brand"><svg width="18" height="18" viewBox="0 0 16 16" aria-hidden="true"><path
      fill="currentColor" d="M3 1h10L8 8zM3 15h10L8 8z"/></svg>ccproxy</h1>
    <p class="link" id="link" role="status"><span class="dot" id="dot"></span><span
      id="link-text"></span></p>
    <div class="tools">
      <label><span class="away" data-word="language"></span><select id="language">
        <option value="en" lang="en">English</option><option value="ko" lang="ko">한국어</option>
        <option value="zh" lang="zh-Hans">中文</option></select></label>
      <button class="quiet icon" id="theme" type="button"><svg viewBox="0 0 20 20"
        aria-hidden="true"><circle cx="10" cy="10" r="7"/><path fill="currentColor"
        d="M10 3a7 7 0 0 1 0 14z"/></svg></button>
      <button class="quiet icon" id="lock" type="button"><svg viewBox="0 0 20 20"
        aria-hidden="true"><rect x="4" y="9" width="12" height="8" rx="2"/><path id="shackle"
        d="M7 9V6.5a3 3 0 0 1 6 0V9"/></svg></button>
    </div>
  </div>
  <nav data-label-word="sections">
    <a href="#overview"><svg viewBox="0 0 20 20" aria-hidden="true"><path
      d="M3 17V9M8 17V3M13 17v-6M18 17V6"/></svg><span data-word="overview"></span></a>
    <a href="#requests"><svg viewBox="0 0 20 20" aria-hidden="true"><path
      d="M3 5h14M3 10h14M3 15h9"/></svg><span data-word="requests"></span></a>
    <a href="#models"><svg viewBox="0 0 20 20" aria-hidden="true"><path
      d="M10 2l7 4v8l-7 4-7-4V6zM3 6l7 4 7-4M10 10v8"/></svg><span data-word="models"></span></a>
    <a href="#keys"><svg viewBox="0 0 20 20" aria-hidden="true"><circle cx="6.5" cy="13.5" r="3.5"/>
      <path d="M9 11l8-8M14 6l3 3"/></svg><span data-word="keys"></span></a>
    <a href="#connect"><svg viewBox="0 0 20 20" aria-hidden="true"><path
      d="M7 13l-3 0a3 3 0 0 1 0-6h3M13 7h3a3 3 0 0 1 0 6h-3M7 10h6"/></svg><span
      data-word="connect"></span></a>
    <a href="#settings"><svg viewBox="0 0 20 20" aria-hidden="true"><path
      d="M3 6h8M15 6h2M3 14h2M9 14h8"/><circle cx="13" cy="6" r="2"/><circle cx="7" cy="14" r="2"/>
      </svg><span data-word="settings"></span></a>
  </nav>
</header>
<main id="main" tabindex="-1">
  <noscript><p class="banner">This page needs JavaScript.</p></noscript>
  <div class="stack" id="banners" role="status"></div>
  <section id="page-overview" aria-labelledby="overview-title" hidden>
    <h2 id="overview-title" class="away" data-word="overview"></h2>
    <dl class="facts" id="facts"></dl>
    <dl class="tiles" id="tiles"></dl>
    <div class="card stack">
      <h3><span data-word="live"></span> <span class="chip" id="live-count">0</span></h3>
      <div id="live"></div>
    </div>
    <div class="grid" id="charts"></div>
    <div class="card stack">
      <div class="heading"><h3 data-word="latest"></h3><a href="#requests" class="small"
        data-word="all_requests"></a></div>
      <div id="latest"></div>
    </div>
  </section>
  <section id="page-requests" aria-labelledby="requests-title" hidden>
    <div class="heading"><h2 id="requests-title" data-word="requests"></h2><span class="note"
      id="shown"></span></div>
    <form class="card filters" id="filters" method="dialog">
      <label class="field"><span data-word="search"></span><input id="filter-text" type="search"
        autocomplete="off" data-hint="search_hint"></label>
      <label class="field"><span data-word="status"></span><select
        id="filter-status"></select></label>
      <label class="field"><span data-word="model"></span><select
        id="filter-model"></select></label>
      <label class="field"><span data-word="client"></span><select
        id="filter-client"></select></label>
      <label class="field"><span data-word="api"></span><select id="filter-api"></select></label>
    </form>
    <div class="card"><div id="recent"></div><button type="button" id="more" data-word="more"
      hidden></button></div>
  </section>
  <section id="page-models" aria-labelledby="models-title" hidden>
    <div class="heading"><h2 id="models-title" data-word="models"></h2><label><span class="away"
      data-word="search"></span><input id="model-search" type="search" autocomplete="off"
      data-hint="search"></label></div>
    <p class="note" data-word="models_note"></p>
    <div class="card" id="model-list"></div>
  </section>
  <section id="page-keys" aria-labelledby="keys-title" hidden>
    <h2 id="keys-title" data-word="stand"></h2>
    <form class="card stack" id="usage-form" method="dialog" autocomplete="off">
      <p class="note" id="usage-note" data-word="stand_note"></p>
      <div class="row"><label class="field narrow"><span data-word="your_key"></span><input
        id="own-key" type="password" autocomplete="off" spellcheck="false"
        aria-describedby="usage-note" placeholder="user_…"></label></div>
      <div class="row"><button class="first" data-word="look_up"></button>
        <button type="button" id="forget" data-word="forget" hidden></button></div>
    </form>
    <div class="stack" id="usage" aria-live="polite"></div>
    <div class="heading"><h2 data-word="operator_keys"></h2><button type="button" id="add-key"
      data-word="add_key"></button></div>
    <p class="note" data-word="operator_note"></p>
    <div class="stack" id="operator"></div>
  </section>
  <section id="page-connect" aria-labelledby="connect-title" hidden>
    <h2 id="connect-title" data-word="connect_title"></h2>
    <p class="note" data-word="connect_note"></p>
    <form class="card filters" id="connect-form" method="dialog">
      <label class="field"><span data-word="address"></span><input id="address" type="url"
        autocomplete="off" spellcheck="false"></label>
      <label class="field"><span data-word="model"></span><select id="pick-model"></select></label>
      <label class="field"><span data-word="shell"></span><select id="shell">
        <option value="sh">sh / zsh</option><option value="ps">PowerShell</option></select></label>
    </form>
    <div class="grid" id="snippets"></div>
  </section>
  <section id="page-settings" aria-labelledby="settings-title" hidden>
    <div class="heading"><h2 id="settings-title" data-word="settings"></h2><button type="button"
      class="danger" id="restart" data-word="restart"></button></div>
    <p class="note" id="config-file"></p>
    <div class="stack" id="config-notes" aria-live="polite"></div>
    <label class="field"><span data-word="search"></span><input id="option-search" type="search"
      autocomplete="off"></label>
    <form id="config-form" class="stack" method="dialog" autocomplete="off">
      <div class="card" id="options"></div>
      <div class="card savebar" id="savebar" hidden><span id="changes" role="status"></span>
        <button type="button" id="discard" data-word="discard"></button>
        <button class="first" data-word="save"></button></div>
    </form>
  </section>
</main>
<div class="toast" id="toast" role="status" hidden></div>
<script>@SCRIPT@</script>
</body>
</html>
"""


# === PAGE WORDS (pure) ======================================================
# Every text of the dashboard: `key: English | Korean | Chinese (simplified)`.
# Short ones share a line, with || between; an indented line goes on with the one
# before.  {name} is filled in by the script.  A key may be a text of the server's.

PAGE_WORDS = r"""
skip: Skip to content | 본문으로 건너뛰기 | 跳到正文 || language: Language | 언어 | 语言 || theme: Theme | 테마 | 主题
sections: Sections | 섹션 | 分区 || theme_auto: as the system | 시스템 설정 | 跟随系统 || keys: Keys | 키 | 密钥
theme_light: light | 밝게 | 浅色 || theme_dark: dark | 어둡게 | 深色 || overview: Overview | 개요 | 概览
requests: Requests | 요청 | 请求 || models: Models | 모델 | 模型 || connect: Connect | 연결 | 接入
settings: Settings | 설정 | 设置 || link_waiting: Connecting… | 연결 중… | 连接中…
link_live: Live | 실시간 | 实时 || link_ok: Running | 실행 중 | 运行中 || link_asleep: Paused | 일시 중지 | 已暂停
link_draining: Draining | 종료 준비 중 | 正在排空 || link_lost: Connection lost | 연결 끊김 | 连接已断开
lost_note: Connection lost. What you see may be out of date; trying again…
  | 연결이 끊겼습니다. 표시된 내용이 최신이 아닐 수 있습니다. 다시 연결하는 중… | 连接已断开。所示内容可能已过时，正在重新连接…
draining_note: The proxy is stopping: running answers may finish, new requests are refused.
  | 프록시가 종료되는 중입니다. 진행 중인 응답은 끝까지 처리되고 새 요청은 거부됩니다. | 代理正在停止：进行中的回答会完成，新请求会被拒绝。
alert_minCurrentBalance: {name}: balance {value} is below {limit} (since {when})
  | {name}: 잔액 {value}이(가) {limit}보다 적습니다 ({when}부터) | {name}：余额 {value} 低于 {limit}（自 {when}）
alert_minExpiringBalance: {name}: expiring credit {value} is below {limit} (since {when}) | {name}:
  만료 예정 크레딧 {value}이(가) {limit}보다 적습니다 ({when}부터) | {name}：即将到期的额度 {value} 低于 {limit}（自 {when}）
alert_maxRequiredDailyBurn: {name}: {value} a day would have to be spent, more than {limit} (since
  {when}) | {name}: 하루에 {value}을(를) 써야 하며 {limit}보다 많습니다 ({when}부터)
  | {name}：每天需花费 {value}，超过 {limit}（自 {when}）
alert_windowAlert: {name}: {value} of a usage window is used, {limit} or more (since {when})
  | {name}: 사용량 한도의 {value}을(를) 사용했습니다. 알림 기준 {limit} ({when}부터)
  | {name}：用量窗口已使用 {value}，达到告警线 {limit}（自 {when}）
alert_accountRefused: {name}: the upstream refused the key (since {when})
  | {name}: 업스트림이 키를 거부했습니다 ({when}부터) | {name}：上游拒绝了此密钥（自 {when}）
alert_accountsUnusable: None of the operator's accounts is usable (since {when})
  | 사용할 수 있는 운영자 계정이 없습니다 ({when}부터) | 没有可用的运营者账户（自 {when}）
alert_errorRateAlert: {value} of requests fail, {limit} or more (since {when})
  | 요청의 {value}이(가) 실패합니다. 알림 기준 {limit} ({when}부터) | {value} 的请求失败，达到告警线 {limit}（自 {when}）
state: State | 상태 | 状态 || version: Version | 버전 | 版本 || upstream: Upstream | 업스트림 | 上游
uptime: Uptime | 가동 시간 | 运行时间 || open_streams: Open streams | 열린 스트림 | 打开的流
connections: Connections | 연결 수 | 连接数 || last_hour: last 60 minutes | 최근 60분 | 最近 60 分钟
errors: Errors | 오류 | 错误 || tokens: Tokens | 토큰 | 令牌 || tokens_in: Tokens in | 입력 토큰 | 输入令牌
tokens_out: Tokens out | 출력 토큰 | 输出令牌 || first_event: First event | 첫 이벤트 | 首个事件
median: median | 중앙값 | 中位数 || p50: p50 | p50 | p50 || p95: p95 | p95 | p95 || time: Time | 시간 | 时间
cache_share: Cache share | 캐시 비율 | 缓存占比 || cached: From cache | 캐시에서 | 来自缓存
of_input: of tokens in | 입력 토큰 중 | 占输入令牌 || live: Running now | 진행 중 | 正在进行
nothing_runs: Nothing is running. | 진행 중인 요청이 없습니다. | 目前没有进行中的请求。 || total: Total | 전체 | 总计
nothing_yet: No requests yet. | 아직 요청이 없습니다. | 还没有请求。 || latest: Last requests | 최근 요청 | 最近请求
nothing_fits: No request fits the filter. | 조건에 맞는 요청이 없습니다. | 没有符合条件的请求。 || model: Model | 모델 | 模型
and_more: and {count} more | 외 {count}개 | 另有 {count} 个 || all_requests: All requests | 모든 요청 | 全部请求
as_table: As a table | 표로 보기 | 以表格显示 || status: Status | 상태 | 状态 || client: Client | 클라이언트 | 客户端
read_out: Point at the chart, or focus it and use the arrow keys. | 차트를 가리키거나 초점을 두고 화살표 키를 사용하세요.
  | 指向图表，或聚焦后使用方向键。
api: API | API | API || key: Key | 키 | 密钥 || phase: Phase | 단계 | 阶段 || all: All | 전체 | 全部
characters: Characters | 문자 수 | 字符数 || phase_reading: reading | 읽는 중 | 读取中
phase_waiting: waiting | 대기 중 | 等待中 || phase_thinking: thinking | 생각 중 | 思考中
phase_answering: answering | 응답 중 | 回答中 || search: Search | 검색 | 搜索 || more: Show more | 더 보기 | 显示更多
search_hint: model, client, error, trace id… | 모델, 클라이언트, 오류, 추적 ID… | 模型、客户端、错误、追踪 ID…
status_ok: succeeded | 성공 | 成功 || status_failed: failed | 실패 | 失败 || request: Request | 요청 | 请求
status_left: client left | 클라이언트 이탈 | 客户端离开 || close: Close | 닫기 | 关闭 || cancel: Cancel | 취소 | 取消
shown: {count} of {of} | {of}개 중 {count}개 | {count} / {of} || yes: yes | 예 | 是 || no: no | 아니요 | 否
copied: Copied | 복사했습니다 | 已复制 || copy: Copy | 복사 | 复制 || field_at: Began | 시작 | 开始
copy_trace: Copy trace id | 추적 ID 복사 | 复制追踪 ID || field_asked: Asked for | 요청한 모델 | 请求的模型
field_stream: Streamed | 스트리밍 | 流式 || field_input: Tokens in | 입력 토큰 | 输入令牌
field_output: Tokens out | 출력 토큰 | 输出令牌 || field_reasoning: For thinking | 추론 토큰 | 思考令牌
field_cost: Cost | 비용 | 费用 || field_first: First event after | 첫 이벤트까지 | 首个事件用时
field_total: Total time | 전체 시간 | 总用时 || field_retries: Retries | 재시도 | 重试
field_notes: Notes | 참고 | 备注 || field_error: Error | 오류 | 错误 || unlock: Unlock | 잠금 해제 | 解锁
field_trace: Trace id | 추적 ID | 追踪 ID || admin_key: Enter the adminKey | adminKey 입력 | 输入 adminKey
admin_key_note: It is kept in this tab's memory alone, until you close or reload the page.
  | 이 탭의 메모리에만 보관되며 페이지를 닫거나 새로 고치면 사라집니다. | 仅保存在此标签页的内存中，关闭或刷新后即消失。
key_refused: This key was not accepted. | 이 키는 받아들여지지 않았습니다. | 该密钥未被接受。 || on: On | 사용 | 启用
odd_key: A key holds visible ASCII characters only. | 키에는 ASCII 문자만 쓸 수 있습니다. | 密钥只能包含可见的 ASCII 字符。
unlock_changes: Unlock changes with the adminKey | adminKey로 변경 허용 | 用 adminKey 解锁修改
lock: Forget the adminKey | adminKey 지우기 | 忘记 adminKey || context: Context | 컨텍스트 | 上下文
locked: The adminKey is forgotten. | adminKey를 지웠습니다. | 已忘记 adminKey。 || vision: Vision | 이미지 | 图像
not_changed: Nothing was changed. | 변경된 것이 없습니다. | 未作任何修改。 || max_output: Output | 최대 출력 | 最大输出
no_admin_key: Nothing can be changed here until an adminKey is set: start the proxy with
  CC_ADMIN_KEY in its environment, or write "adminKey" into config.json, and start it again.
  | adminKey를 설정해야 변경할 수 있습니다. 환경 변수 CC_ADMIN_KEY를 주고 프록시를 시작하거나 config.json에 "adminKey"를 적고 다시
  시작하세요. | 设置 adminKey 后才能在此修改：启动代理时设置环境变量 CC_ADMIN_KEY，或在 config.json 中写入 "adminKey" 后重新启动。
models_note: A model that is switched off is not listed, and asking for it is an error that names
  its nearest relatives. | 꺼진 모델은 목록에 나오지 않으며, 요청하면 비슷한 모델을 알려 주는 오류가 됩니다.
  | 关闭的模型不会列出；请求它会得到错误，并提示最接近的模型。
efforts: Efforts | 추론 강도 | 思考强度 || plan: Plan | 요금제 | 套餐 || from_file: from the file | 파일에서 | 来自文件
switched_on: {model} is on. | {model} 사용을 시작합니다. | 已启用 {model}。 || default_is: Default | 기본값 | 默认
still_off: {model} is still off: see `models` in Settings.
  | {model}이(가) 아직 꺼져 있습니다. 설정의 `models`를 확인하세요. | {model} 仍处于停用状态：请查看设置中的 `models`。
switched_off: {model} is off. | {model} 사용을 중지합니다. | 已停用 {model}。 || save: Save | 저장 | 保存
overridden: {name} stays as it is: {source} wins over the file.
  | {name}: {source} 값이 파일보다 우선하므로 그대로 유지됩니다. | {name} 保持不变：{source} 优先于文件。
at_start: needs a restart | 재시작 필요 | 需要重启 || set_by: set by {source} | {source}에서 설정 | 由 {source} 设定
is_set: set; type to replace it | 설정됨, 바꾸려면 입력 | 已设置，输入以替换 || is_unset: not set | 설정 안 됨 | 未设置
reset: Back to the default | 기본값으로 | 恢复默认 || discard: Discard | 되돌리기 | 放弃
config_in: What is saved here is written to {file}. | 저장하면 {file}에 기록됩니다. | 保存的内容写入 {file}。
config_fixed: {file} cannot be written. | {file}에 쓸 수 없습니다. | 无法写入 {file}。
no_config_file: This proxy was started without a config file. | 이 프록시는 설정 파일 없이 시작되었습니다.
  | 此代理启动时没有配置文件。
changes: {count} to save: {names} | 저장할 변경 {count}개: {names} | {count} 项待保存：{names}
applied: In effect now: {names} | 지금부터 적용: {names} | 已生效：{names} || restart: Restart | 재시작 | 重启
restart_needed: In effect after a restart: {names} | 재시작 후 적용: {names} | 重启后生效：{names}
restart_note: Requests in progress may finish. Until then, for at most {seconds} s (drainSeconds),
  new requests wait; no connection is refused. This page reconnects by itself.
  | 진행 중인 요청은 끝까지 처리됩니다. 그동안 새 요청은 최대 {seconds}초(drainSeconds) 대기하며 연결은 거부되지 않습니다. 이 페이지는 자동으로 다시
  연결됩니다. | 进行中的请求会完成。在此期间，新请求最多等待 {seconds} 秒（drainSeconds），不会拒绝连接。 此页面会自动重新连接。
restarting: Restarting… | 재시작하는 중… | 正在重启… || stand: Where you stand | 내 사용 현황 | 我的用量
stand_note: Your own key is sent to this proxy alone, and kept in this tab's memory until you forget
  it or close or reload the page. | 키는 이 프록시에만 보내고, 지우거나 페이지를 닫거나 새로 고칠 때까지 이 탭의 메모리에만 둡니다.
  | 密钥只发送给此代理，仅保存在此标签页的内存中，直到您忘记它、关闭或刷新页面。
your_key: Your key | 내 키 | 您的密钥 || look_up: Look up | 조회 | 查询 || asking: Asking… | 조회 중… | 查询中…
forget: Forget the key | 키 지우기 | 忘记密钥 || balance: Balance | 잔액 | 余额 || window_weekly: Week | 1주 | 一周
operators_own: These are the operator's keys, which serve you here. | 여기서 대신 쓰이는 운영자의 키입니다.
  | 这些是在此为您服务的运营者密钥。
credit_monthly: Monthly credit | 월간 크레딧 | 每月额度 || credit_free: Free credit | 무료 크레딧 | 免费额度
credit_purchased: Purchased credit | 구매 크레딧 | 购买额度 || window_five_hour: 5 hours | 5시간 | 5 小时
resets: Resets | 초기화 | 重置于 || until: {when}, in {span} | {when}, {span} 후 | {when}，{span}后
burn: To spend | 소진 속도 | 需花费 || a_day: {amount} a day | 하루 {amount} | 每天 {amount}
period_end: Period ends | 기간 종료 | 周期结束 || figures_age: Figures from | 조회 시점 | 数据时间
ago: {span} ago | {span} 전 | {span}前 || state_usable: usable | 사용 가능 | 可用 || key_off: off | 꺼짐 | 已停用
no_figures: No figures are known of this account. | 이 계정의 수치를 알 수 없습니다. | 尚无此账户的数据。
state_refused: refused | 거부됨 | 被拒绝 || state_skipped: skipped | 건너뜀 | 已跳过
state_unknown: unknown | 알 수 없음 | 未知 || weight: Weight | 가중치 | 权重
it is out of credit: It is out of credit. | 크레딧이 없습니다. | 额度已用完。
the upstream refused it: The upstream refused it. | 업스트림이 거부했습니다. | 上游拒绝了此密钥。
it is over its usage window: It is over its usage window. | 사용량 한도를 넘었습니다. | 已超出用量窗口。
it is in cooldown: It is in cooldown. | 잠시 쉬는 중입니다. | 正在冷却。 || in_flight: Running | 진행 중 | 进行中
through: Through here | 이 프록시 경유 | 经由此处 || allowed_models: Models allowed | 허용 모델 | 允许的模型
its plan or account lacks this model: Its plan or account lacks this model. | 요금제나 계정에 이 모델이 없습니다.
  | 其套餐或账户没有此模型。
its allowedModels lack this model: Its allowed models lack this model. | 허용 모델에 이 모델이 없습니다.
  | 其允许的模型中没有此模型。
through_proxy: {requests} requests, {failures} failed · {input} → {output} tokens · {cost}
  | 요청 {requests}개, 실패 {failures}개 · 토큰 {input} → {output} · {cost}
  | {requests} 个请求，{failures} 个失败 · {input} → {output} 令牌 · {cost}
max_in_flight: At most at once (0: any number) | 동시 요청 한도 (0: 제한 없음) | 并发上限（0：不限）
models_hint: ids with commas; empty: all | 쉼표로 구분, 비우면 전체 | 以逗号分隔，留空为全部 || key_id: Name | 이름 | 名称
operator_keys: Operator's keys | 운영자 키 | 运营者密钥 || add_key: Add a key | 키 추가 | 添加密钥
operator_note: Keys that are lent to callers without one of their own. A key comes in once and is
  never shown again. | 자기 키가 없는 호출자에게 빌려주는 키입니다. 한 번 입력한 키는 다시 표시되지 않습니다.
  | 借给没有自己密钥的调用者使用。密钥输入后不会再显示。
keys_in: Kept in {file} · policy {policy} | {file}에 보관 · 정책 {policy} | 保存在 {file} · 策略 {policy}
no_key_file: Keys can be added and changed here only where they are in a file of their own: set
  credentialsFile (COMMANDCODE_CREDENTIALS_FILE).
  | 키를 별도 파일에 둘 때만 여기서 추가하고 바꿀 수 있습니다. credentialsFile (COMMANDCODE_CREDENTIALS_FILE)을 설정하세요.
  | 只有密钥保存在单独的文件中时才能在此添加和修改：请设置 credentialsFile (COMMANDCODE_CREDENTIALS_FILE)。
no_keys: There are no operator's keys. | 운영자 키가 없습니다. | 没有运营者密钥。 || in_use: In use | 사용 | 使用
add_key_note: The key is written to the operator's file and never shown again.
  | 키는 운영자 파일에 기록되며 다시 표시되지 않습니다. | 密钥写入运营者文件，之后不再显示。
edit: Edit | 편집 | 编辑 || delete: Delete | 삭제 | 删除 || address: Address | 주소 | 地址
key_added: The key was added. | 키를 추가했습니다. | 已添加密钥。 || shell: Shell | 셸 | Shell
delete_note: {name} is taken out of the file; requests that run on it may finish.
  | {name} 키를 파일에서 지웁니다. 진행 중인 요청은 끝까지 처리됩니다. | 将从文件中删除 {name}；正在使用它的请求会完成。
key_changed: The key was changed. | 키를 바꿨습니다. | 已修改密钥。 || then: then | 그다음 | 然后
key_deleted: The key was deleted. | 키를 삭제했습니다. | 已删除密钥。 || to_shell: In a terminal. | 터미널에서. | 在终端中。
connect_title: Connect a client | 클라이언트 연결 | 接入客户端 || or_run: Or in one command: | 명령 하나로: | 或用一条命令：
connect_note: Any key field takes your own Command Code key (user_…). Put it into COMMANDCODE_KEY
  and copy what your client wants. | 모든 키 칸에 자신의 Command Code 키(user_…)를 쓸 수 있습니다. COMMANDCODE_KEY에
  넣고 필요한 부분을 복사하세요. | 任何密钥栏都可填您自己的 Command Code 密钥（user_…）。将它放入 COMMANDCODE_KEY，再复制所需内容。
to_codex: In ~/.codex/config.toml; the key is taken from COMMANDCODE_KEY. | ~/.codex/config.toml에
  적습니다. 키는 COMMANDCODE_KEY에서 읽습니다. | 写入 ~/.codex/config.toml；密钥取自 COMMANDCODE_KEY。
to_opencode: In opencode.json; the key is taken from COMMANDCODE_KEY.
  | opencode.json에 적습니다. 키는 COMMANDCODE_KEY에서 읽습니다. | 写入 opencode.json；密钥取自 COMMANDCODE_KEY。
to_cursor: In Settings, Models. Cursor's servers make the call, so the address must be reachable for
  them, with TLS. | Settings, Models에서. Cursor 서버가 호출하므로 TLS로 접근 가능한 주소여야 합니다.
  | 在 Settings, Models 中。由 Cursor 的服务器发起调用，地址须可经 TLS 从外部访问。
to_llm: In extra-openai-models.yaml of llm's folder, then in a terminal. | llm 폴더의
  extra-openai-models.yaml에 적고 터미널에서 실행합니다. | 写入 llm 文件夹中的 extra-openai-models.yaml，然后在终端运行。
"""


# === PAGE SCRIPT (pure) =====================================================
# The ground of the dashboard's script: building nodes, words and figures,
# calls and events, asking.  Whatever a client, upstream or file wrote becomes
# text by textContent or an attribute that holds text, never markup.  Keys live
# in variables of the tab alone: no storage, cookie or address ever holds one.

PAGE_SCRIPT = r"""
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const AWAY_MS = 60000, SILENT_MS = 40000, LONGEST_WAIT_MS = 15000, MOST_RECORDS = 500;
const shared = { state: null, recent: [], minutes: [], models: [], config: null, page: "overview",
  link: "waiting", at: 0 };
const views = {};           // page -> {load(): asked for once a visit, show(): drawn anew}
let adminKey = "";          // in this tab's memory alone
let asking = null, declined = false, language = "en";

// What is remembered: language and theme, nothing else.
function remembered(name) {
  try { return localStorage.getItem("ccproxy." + name); } catch { return null; }
}
function remember(name, value) {
  try { localStorage.setItem("ccproxy." + name, value); } catch { /* a tab without storage */ }
}

// Building the page: text is only ever text.
function attach(node, given, inside) {
  for (const [name, value] of Object.entries(given || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else if (name in node && (typeof value === "boolean" || name === "value")) node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...inside.flat(3).filter((one) => one || one === 0));
  return node;
}
function make(tag, given, ...inside) {
  const [name, ...classes] = tag.split(".");
  const node = document.createElement(name);
  if (classes.length) node.className = classes.join(" ");
  return attach(node, given, inside);
}
const draw = (tag, given, ...inside) => attach(document.createElementNS(SVG, tag), given, inside);
function fill(id, ...inside) {
  $(id).replaceChildren(...inside.flat(3).filter((one) => one || one === 0));
}
// Only what differs is moved, so that focus and selection stay where they are.
function settle(parent, children) {
  children.forEach((child, at) => {
    if (parent.children[at] !== child) parent.insertBefore(child, parent.children[at] || null);
  });
  while (parent.children.length > children.length) parent.lastElementChild.remove();
}

// Words, figures and times in the chosen language.
function say(key, values) {
  const words = (WORDS[language] || WORDS.en)[key] || key;
  return words.replace(/\{(\w+)\}/g, (whole, name) => String((values || {})[name] ?? whole));
}
function format(value, digits, options) {
  return Number.isFinite(value) ? new Intl.NumberFormat(language, { maximumFractionDigits: digits,
    ...options }).format(value) : "–";
}
const figure = (value, digits) => format(value, digits || 0);
const compact = (value) => format(value, 1, { notation: "compact" });
const percent = (share) => format(share, 1, { style: "percent" });
const money = (value) => format(value, value && Math.abs(value) < 0.1 ? 4 : 2, {
  style: "currency", currency: "USD", currencyDisplay: "narrowSymbol" });
const unit = (value, name, digits) => format(value, digits || 0, { style: "unit", unit: name,
  unitDisplay: "narrow" });
function span(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 1) return unit(seconds * 1000, "millisecond");
  if (seconds < 60) return unit(seconds, "second", seconds < 10 ? 1 : 0);
  const parts = [["day", 86400], ["hour", 3600], ["minute", 60], ["second", 1]].map(
    ([name, size], at, all) => [Math.floor(seconds % (at ? all[at - 1][1] : Infinity) / size),
      name]);
  const first = parts.findIndex(([count]) => count > 0);
  return parts.slice(first, first + 2).filter(([count]) => count)
    .map(([count, name]) => unit(count, name)).join(" ");
}
function moment(seconds, options) {
  return new Intl.DateTimeFormat(language, { hour: "2-digit", minute: "2-digit",
    hourCycle: "h23", ...options }).format(new Date(seconds * 1000));
}
const day = (seconds) => moment(seconds, { year: "numeric", month: "short", day: "numeric",
  second: "2-digit" });
function until(iso) {
  const seconds = Date.parse(iso) / 1000, left = seconds - Date.now() / 1000;
  if (!Number.isFinite(seconds)) return "–";
  const when = moment(seconds, { weekday: "short", month: "short", day: "numeric" });
  return left > 0 ? say("until", { when, span: span(left) }) : when;
}

// The network: our own address only, keys in headers only.
async function call(method, path, body, key) {
  if (key && !/^[!-~]+$/.test(key)) throw new Error(say("odd_key"));
  const headers = { accept: "application/json" };
  if (key) headers.authorization = "Bearer " + key;
  if (body !== undefined) headers["content-type"] = "application/json";
  const answer = await fetch(path, { method, headers, cache: "no-store", credentials: "omit",
    body: body === undefined ? undefined : JSON.stringify(body) });
  const data = await answer.json().catch(() => ({}));
  if (answer.ok) return data;
  const fault = (data && data.error) || {};
  throw Object.assign(new Error(fault.message || "HTTP " + answer.status),
    { status: answer.status, param: fault.param });
}
function askAdminKey(fault) {
  asking = asking || ask(say("admin_key"), say("admin_key_note"),
    [{ name: "key", label: "adminKey", type: "password", fault }], say("unlock"))
    .then((given) => {
      adminKey = (given && given.key.trim()) || "";
      declined = !adminKey;
      showLock();
      wakeUp();
      return Boolean(adminKey);
    }).finally(() => { asking = null; });
  return asking;
}
async function withKey(method, path, body) {
  for (;;) {
    const used = adminKey;
    try { return await call(method, path, body, used); } catch (error) {
      if (error.status !== 401) throw error;
      if (adminKey !== used && adminKey) continue;        // another call was given it meanwhile
      if (declined && !used) throw error;                 // asked once: from now on by the button
      if (!await askAdminKey(used && say("key_refused"))) throw error;
    }
  }
}
const read = (path) => withKey("GET", path);
async function write(method, path, body) {
  if (shared.state && !shared.state.admin_key) throw new Error(say("no_admin_key"));
  if (!adminKey && !await askAdminKey()) throw new Error(say("not_changed"));
  return withKey(method, path, body);
}

// Dialogs: what to enter, or whether to go on; null is "no".
function ask(title, note, fields, yes, danger) {
  return new Promise((resolve) => {
    let given = null;
    const form = make("form.stack", { method: "dialog",
      submit: () => { given = Object.fromEntries(new FormData(form)); } },
    make("h2", null, title), note && make("p.note", null, note),
    fields.map((field) => make("label.field", null, make("span", null, field.label),
      make("input", { type: field.type || "text", name: field.name, value: field.value ?? "",
        autocomplete: "off", spellcheck: "false", placeholder: field.hint }),
      field.fault && make("span.fault", { role: "alert" }, field.fault))),
    make("div.row", null, make(danger ? "button.danger" : "button.first", null, yes),
      make("button", { type: "button", click: () => dialog.close() }, say("cancel"))));
    const dialog = make("dialog", { "aria-label": title, close: () => resolve(given) }, form);
    open(dialog);
  });
}
function open(dialog) {
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}
let toastTimer = 0;
function toast(text) {
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { $("toast").hidden = true; }, 6000);
}
async function copy(text) {
  try { await navigator.clipboard.writeText(text); } catch {      // plain HTTP from elsewhere
    const area = make("textarea.away", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast(say("copied"));
}

// Events: one stream, taken up again when it breaks, let go of while nobody looks.
let stopEvents = () => {}, heard = 0;
const TAKERS = {
  state: ({ minute, ...state }) => {
    shared.state = { ...shared.state, ...state };
    shared.at = performance.now();
    if (minute) {
      shared.minutes = shared.minutes.filter((one) => one.at !== minute.at).concat(minute)
        .slice(-61);
    }
    refresh();
  },
  request: (record) => {
    shared.recent = [record, ...shared.recent].slice(0, MOST_RECORDS);
    refresh();
  },
  lost: () => stopEvents() };
function takeEvent(text) {
  const [, name, data] = /^event: (\w+)\ndata: (.+)/m.exec(text) || [];
  if (TAKERS[name]) TAKERS[name](JSON.parse(data));
}
async function listen() {
  const control = new AbortController();
  stopEvents = () => control.abort();
  const watch = setInterval(() => {
    if (performance.now() - heard > SILENT_MS) control.abort();
  }, 5000);
  try {
    const answer = await fetch("/admin/events", { cache: "no-store", signal: control.signal,
      credentials: "omit", headers: adminKey ? { authorization: "Bearer " + adminKey } : {} });
    if (!answer.ok) throw new Error("HTTP " + answer.status);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    setLink("live");
    for (;;) {
      heard = performance.now();
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      events.forEach(takeEvent);
    }
  } finally { clearInterval(watch); }
}
let wakeUp = () => {};
function nap(milliseconds) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    wakeUp = () => { clearTimeout(timer); resolve(); };
  });
}
async function follow() {
  for (let wait = 500; ; wait = Math.min(wait * 2, LONGEST_WAIT_MS)) {
    while (document.hidden && shared.link === "asleep") await nap(AWAY_MS);
    try {
      const { recent, minutes, ...state } = await read("/admin/state");
      const again = shared.link === "lost" || !shared.state;
      Object.assign(shared, { state, recent, minutes, at: performance.now() });
      if (again) reload();
      shared.fault = "";
      refresh();
      heard = performance.now();
      await listen();
      wait = 500;
    } catch (error) {
      if (shared.link === "live") wait = 500;
      shared.fault = error.status ? error.message : "";
    }
    if (document.hidden && shared.link === "asleep") continue;
    setLink("lost");
    await nap(wait);
  }
}
let hiding = 0;
document.addEventListener("visibilitychange", () => {
  clearTimeout(hiding);
  if (document.hidden) hiding = setTimeout(() => { setLink("asleep"); stopEvents(); }, AWAY_MS);
  else wakeUp();
});
function setLink(link) {
  shared.link = link;
  refresh();
}
"""


# === PAGE FRAME (pure) ======================================================
# What is around the dashboard's pages: the way about, language and theme, the
# state of the connection, and the forms that pages share: tables, and charts as
# inline SVG, with a read-out for pointer and arrow keys.

PAGE_FRAME = r"""
// Drawing: at most once a frame, and only the page that is looked at.
let due = false;
function refresh() {
  if (due) return;
  due = true;
  setTimeout(() => { due = false; redraw(); }, 60);
}
function redraw() {
  showLink();
  showLock();
  showBanners();
  if (shared.state) views[shared.page].show?.();
}
function showLink() {
  const { state, link } = shared, words = link === "live" && state ? state.status : link;
  $("link").dataset.link = state && link === "live" && state.status !== "ok" ? "waiting" : link;
  $("dot").classList.toggle("busy", Boolean(state && state.in_flight));
  put("link-text", say("link_" + words));
}
// A live region is told of a change only when there is one.
function put(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}
function showLock() {
  $("lock").title = $("lock").ariaLabel = say(adminKey ? "lock" : "unlock_changes");
  $("lock").ariaPressed = String(Boolean(adminKey));
  $("shackle").setAttribute("d", "M7 9V6.5a3 3 0 0 1 " + (adminKey ? "5.8-1" : "6 0V9"));
}
let bannersShown = "";
function showBanners() {
  const { state, link, fault } = shared, rows = [];
  if (link === "lost") rows.push(["bad", fault || say("lost_note")]);
  if (state && state.status === "draining") rows.push(["warn", say("draining_note")]);
  for (const alert of (state && state.alerts) || []) {
    const shown = /^(min|max)/.test(alert.kind) ? money : (value) => percent(value / 100);
    rows.push(["warn", say("alert_" + alert.kind, { name: alert.name || alert.key,
      value: shown(alert.value), limit: shown(alert.limit), when: day(alert.since) })]);
  }
  const now = JSON.stringify(rows);
  if (now === bannersShown) return;
  bannersShown = now;
  fill("banners", rows.map(([kind, text]) => make("p.banner", { class: "banner " + kind }, text)));
}

// Tables whose rows become cards on a narrow page: {label, of, class}, `of` gives text or a node.
function rowOf(columns, one, given) {
  return make("tr", { role: "row", ...given }, columns.map((column) => make("td", { role: "cell",
    class: column.class, "data-label": column.short ? column.label : null }, column.of(one))));
}
function tableOf(columns, rows, caption) {
  return make("table.cards", { role: "table", "aria-label": caption },
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, columns.map((column) =>
      make("th", { role: "columnheader", scope: "col", class: column.class }, column.label)))),
    make("tbody", { role: "rowgroup" }, rows));
}
function listOf(columns, rows, caption, given) {
  return make("div.scroll", null, tableOf(columns, rows.map((one) =>
    rowOf(columns, one, given && given(one))), caption));
}
const empty = (word) => make("p.empty", null, say(word));
const pairs = (rows) => make("dl.pair", null, rows.filter(Boolean).map(([name, value]) =>
  [make("dt", null, name), make("dd", null, value ?? "–")]));
function meter(share, kind, label) {
  const width = Math.max(0, Math.min(1, share || 0)) * 100;
  return draw("svg", { class: "meter", viewBox: "0 0 100 10", preserveAspectRatio: "none",
    role: "img", "aria-label": label }, draw("rect", { width, height: 10, class: kind }));
}
const warn = (error) => make("p.banner.bad", { role: "alert" }, error.message);

// The ways about the page.
function go() {
  const wanted = location.hash.slice(1);
  shared.page = views[wanted] ? wanted : "overview";
  for (const name of Object.keys(views)) $("page-" + name).hidden = name !== shared.page;
  for (const link of document.querySelectorAll("nav a")) {
    link.ariaCurrent = link.hash === "#" + shared.page ? "page" : null;
  }
  views[shared.page].early?.();
  reload();
  refresh();
}
const reload = () => shared.state && views[shared.page].load?.();
function translate() {
  $("language").value = language;
  document.documentElement.lang = $("language").selectedOptions[0].lang;
  for (const node of document.querySelectorAll("[data-word], [data-hint], [data-label-word]")) {
    const { word, hint, labelWord } = node.dataset;
    if (word) node.textContent = say(word);
    if (hint) node.placeholder = say(hint);
    if (labelWord) node.setAttribute("aria-label", say(labelWord));
  }
  showTheme();
  bannersShown = "";
  Object.values(views).forEach((view) => view.renew?.());
  reload();
  refresh();
}
const THEMES = ["auto", "light", "dark"];
function showTheme() {
  const theme = THEMES.includes(remembered("theme")) ? remembered("theme") : "auto";
  document.documentElement.dataset.theme = theme;
  $("theme").title = $("theme").ariaLabel = say("theme") + ": " + say("theme_" + theme);
  return theme;
}
function startFrame() {
  const wished = [remembered("language"), ...navigator.languages];
  language = wished.map((one) => String(one).slice(0, 2)).find((one) => WORDS[one]) || "en";
  $("language").addEventListener("change", () => {
    language = $("language").value;
    remember("language", language);
    translate();
  });
  $("theme").addEventListener("click", () => {
    remember("theme", THEMES[(THEMES.indexOf(showTheme()) + 1) % THEMES.length]);
    showTheme();
    toast($("theme").title);
  });
  $("lock").addEventListener("click", () => {
    if (!adminKey) { askAdminKey(); return; }
    adminKey = "";
    showLock();
    toast(say("locked"));
  });
  $("skip").addEventListener("click", (event) => { event.preventDefault(); $("main").focus(); });
  window.addEventListener("hashchange", () => { go(); window.scrollTo(0, 0); });
  translate();
  go();
  follow();
}

// Charts of the last 60 minutes: a row is one, its series are functions of a minute.
const share = (minute) => (minute && minute.input ? (minute.cached || 0) / minute.input : null);
const of = (name, empty) => (minute) => (minute ? minute[name] ?? empty : empty);
const CHARTS = [
  { name: "requests", show: figure, kind: "bars", least: 4, series: [
    ["requests", "first", of("requests", 0)], ["errors", "bad", of("errors", 0)]] },
  { name: "tokens", show: compact, kind: "lines", least: 1000, series: [
    ["tokens_in", "first", of("input", 0)], ["tokens_out", "second", of("output", 0)]] },
  { name: "first_event", show: span, kind: "dots", least: 1, series: [
    ["p50", "first", of("first_p50", null)], ["p95", "second", of("first_p95", null)]] },
  { name: "cache_share", show: percent, kind: "dots", least: 1, most: 1, series: [
    ["cached", "first", share]] }];
const HEIGHT = 168, LEFT = 46, RIGHT = 8, TOP = 8, BOTTOM = 22, SPAN = 60;

function slotsOf(minutes) {
  const now = Math.floor(Date.now() / 60000) * 60, known = new Map();
  minutes.forEach((minute) => known.set(Math.floor(minute.at / 60) * 60, minute));
  const last = Math.max(now, ...known.keys());
  return Array.from({ length: SPAN }, (_, at) => {
    const start = last - (SPAN - 1 - at) * 60;
    return { at: start, minute: known.get(start) };
  });
}
// Twice the least of 1, 2, 2.5, 5, 10 ... that reaches this in two steps.
function niceTop(most) {
  const half = most / 2, size = 10 ** Math.floor(Math.log10(half));
  return 2 * [1, 2, 2.5, 5, 10].find((one) => one * size >= half * 0.9999) * size;
}
const pathOf = (points) => points.map(([x, y], at) => (y === null ? "" :
  (at && points[at - 1][1] !== null ? "L" : "M") + x.toFixed(1) + " " + y.toFixed(1))).join("");
function makeChart(chart) {
  const aim = ({ clientX }) => {
    const box = plot.getBoundingClientRect();
    point(drawn, Math.floor((clientX - box.left - LEFT) / (box.width - LEFT - RIGHT) * SPAN));
  };
  const plot = draw("svg", { class: "plot", tabindex: "0", role: "img", pointermove: aim,
    pointerdown: aim, pointerleave: () => point(drawn, null), keydown: (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") point(drawn, null);
      if (!step) return;
      event.preventDefault();
      readout.setAttribute("aria-live", "polite");
      point(drawn, (drawn.at ?? SPAN) + step);
    } });
  const legend = make("div.legend"), readout = make("p.readout", { "aria-live": "off" });
  const table = make("div.tall");
  const details = make("details", { toggle: () => tabulate(drawn) },
    make("summary", null, say("as_table")), table);
  const node = make("figure.card.chart.stack", { id: "chart-" + chart.name },
    make("figcaption", null, make("h3", null, say(chart.name)), legend), plot, readout, details);
  const drawn = { chart, plot, legend, readout, table, details, node, at: null, slots: [] };
  return drawn;
}
function point(drawn, at) {
  drawn.at = at === null ? null : Math.max(0, Math.min(SPAN - 1, at));
  paint(drawn);
}
const reading = ({ chart }, slot) => chart.series.map(([name, , value]) =>
  say(name) + " " + chart.show(value(slot.minute))).join(" · ");

function axes(drawn, top, width, x) {
  const { chart, slots } = drawn, parts = [];
  for (const level of [0, 0.5, 1]) {
    const y = HEIGHT - BOTTOM - level * (HEIGHT - TOP - BOTTOM);
    parts.push(draw("line", { class: "rule", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }),
      draw("text", { x: LEFT - 8, y: y + 4, "text-anchor": "end" },
        level ? chart.show(level * top, 2) : "0"));
  }
  for (const at of [0, 15, 30, 45, SPAN - 1]) {
    parts.push(draw("text", { x: x(at + 0.5), y: HEIGHT - 6, "text-anchor": at ? (
      at === SPAN - 1 ? "end" : "middle") : "start" }, moment(slots[at].at)));
  }
  return parts;
}
function bars(drawn, x, y) {
  const base = HEIGHT - BOTTOM, width = Math.max(1, (x(1) - x(0)) * 0.72);
  return drawn.chart.series.flatMap(([, kind, value]) => drawn.slots.map((slot, at) => {
    const top = y(value(slot.minute));
    return base - top > 0.1 && draw("rect", { class: kind, x: x(at) + (x(1) - x(0)) * 0.14, y: top,
      width, height: base - top, rx: 1 });
  }));
}
function lines(drawn, x, y) {
  const { chart, slots } = drawn;
  return chart.series.flatMap(([, kind, value], number) => {
    const points = slots.map((slot, at) => [x(at + 0.5), y(value(slot.minute))]);
    const path = pathOf(points), gap = (at) => !points[at] || points[at][1] === null;
    const alone = points.filter((point, at) => chart.kind === "dots" && !gap(at) &&
      (gap(at - 1) || gap(at + 1)));
    return [chart.kind === "lines" && !number && draw("path", { class: "area",
      d: path + "V" + (HEIGHT - BOTTOM) + "H" + points[0][0] + "Z" }),
    draw("path", { class: kind, d: path }),
    alone.map(([cx, cy]) => draw("circle", { class: kind, cx, cy, r: 2.5 }))];
  });
}
function paint(drawn) {
  const { chart, plot, slots, at } = drawn, width = Math.max(240, plot.clientWidth || 480);
  const values = chart.series.flatMap(([, , value]) =>
    slots.map((slot) => value(slot.minute) || 0));
  const top = chart.most || niceTop(Math.max(chart.least, ...values));
  const x = (place) => LEFT + place / SPAN * (width - LEFT - RIGHT);
  const y = (value) => (value === null ? null :
    HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM));
  const marks = (chart.kind === "bars" ? bars : lines)(drawn, x, y);
  const cross = at !== null && draw("line", { class: "cross", x1: x(at + 0.5), x2: x(at + 0.5),
    y1: TOP, y2: HEIGHT - BOTTOM });
  plot.setAttribute("viewBox", "0 0 " + width + " " + HEIGHT);
  plot.replaceChildren(...[axes(drawn, top, width, x), marks, cross].flat(3).filter(Boolean));
  const slot = slots[at ?? SPAN - 1];
  drawn.readout.textContent = moment(slot.at) + " · " + reading(drawn, slot);
}
// What the chart says as words and, opened, as a table.
function tabulate(drawn) {
  const { chart, slots } = drawn;
  if (!drawn.details.open) { drawn.table.replaceChildren(); return; }
  const columns = [{ label: say("time"), of: (slot) => moment(slot.at) },
    ...chart.series.map(([name, , value]) => ({ label: say(name), class: "figure",
      of: (slot) => chart.show(value(slot.minute)) }))];
  const table = tableOf(columns, slots.filter((slot) => slot.minute).reverse()
    .map((slot) => rowOf(columns, slot)), say(chart.name));
  table.className = "";
  drawn.table.replaceChildren(table);
}
let charts = [];
function showCharts() {
  if (!charts.length) {
    charts = CHARTS.map(makeChart);
    fill("charts", charts.map((drawn) => drawn.node));
    new ResizeObserver(() => charts.forEach(paint)).observe($("charts"));
  }
  const slots = slotsOf(shared.minutes);
  for (const drawn of charts) {
    drawn.slots = slots;
    const busy = slots.filter((slot) => slot.minute), last = busy[busy.length - 1];
    drawn.legend.replaceChildren(...drawn.chart.series.map(([name, kind]) =>
      make("span", null, make("i", { class: kind }), say(name))));
    drawn.plot.setAttribute("aria-label", say(drawn.chart.name) + ", " + say("last_hour") + ". " +
      (last ? moment(last.at) + ": " + reading(drawn, last) : say("nothing_yet")) +
      " " + say("read_out"));
    paint(drawn);
    tabulate(drawn);
  }
}
"""


# === PAGE REQUESTS (pure) ===================================================
# Overview and requests: what runs, what is over, and all that is known of one.
# Pure data.

PAGE_REQUESTS = r"""
// Overview: state, figures of the last hour, what runs now.
const sum = (rows, name) => rows.reduce((total, row) => total + (row[name] || 0), 0);
function median(values) {
  const sorted = values.filter((one) => one !== null).sort((one, other) => one - other);
  return sorted.length ? sorted[Math.floor((sorted.length - 1) / 2)] : null;
}
function showFacts() {
  const state = shared.state, passed = (performance.now() - shared.at) / 1000;
  fill("facts", [[say("state"), make("span.chip", { class: "chip " + (state.status === "ok" ?
    "good" : "warn") }, say("link_" + state.status))], [say("version"), state.version],
  [say("upstream"), state.upstream.kind + " · " + state.upstream.address],
  [say("uptime"), span(Math.floor((state.uptime_seconds || 0) + passed))],
  [say("open_streams"), figure(state.open_streams)], [say("connections"), figure(state.clients)],
  [say("operator_keys"), figure(state.operator_keys)]]
    .map(([name, value]) => make("div", null, make("dt", null, name), make("dd", null, value))));
}
function showTiles() {
  const hour = shared.minutes.filter((one) => one.at > Date.now() / 1000 - 3600);
  const requests = sum(hour, "requests"), input = sum(hour, "input");
  const recent = shared.recent.filter((one) => one.at > Date.now() / 1000 - 3600);
  const cost = recent.some((one) => one.cost !== null) && sum(recent, "cost");
  fill("tiles", [[say("requests"), figure(requests), say("last_hour")],
    [say("errors"), figure(sum(hour, "errors")), requests ? percent(sum(hour, "errors") /
      requests) : ""], [say("tokens_in"), compact(input), say("last_hour")],
    [say("tokens_out"), compact(sum(hour, "output")), cost === false ? "" : money(cost)],
    [say("first_event"), span(median(recent.map((one) => one.first))), say("median")],
    [say("cache_share"), percent(input ? sum(hour, "cached") / input : null), say("of_input")]]
    .map(([name, value, small]) => make("div.card.tile", null, make("dt", null, name),
      make("dd", null, value, make("small", null, small)))));
}
const LIVE_COLUMNS = [
  { key: "model", class: "wide model", of: (one) => one.model || one.asked || "–" },
  { key: "phase", of: (one) => make("span.chip.info", null, say("phase_" + one.phase)) },
  { key: "client", of: (one) => one.client + " · " + one.api },
  { key: "key", class: "mono", of: (one) => one.key },
  { key: "characters", class: "figure", short: true, of: (one) => figure(one.output_chars) },
  { key: "time", class: "figure end", of: (one) => unit(Math.floor(one.seconds +
    (performance.now() - shared.at) / 1000), "second") }];
const named = (columns) => columns.map((one) => ({ ...one, label: say(one.key) }));
function showLive() {
  const live = shared.link === "live" ? shared.state.live || [] : [];
  put("live-count", figure(live.length));
  fill("live", live.length ? listOf(named(LIVE_COLUMNS), live.slice(0, 50), say("live")) :
    empty("nothing_runs"), live.length > 50 &&
    make("p.note", null, say("and_more", { count: figure(live.length - 50) })));
}
setInterval(() => {
  if (!document.hidden && shared.state && shared.page === "overview") { showFacts(); showLive(); }
}, 1000);
views.overview = {
  show: () => { showFacts(); showTiles(); showLive(); showCharts(); showRows("latest",
    shared.recent.slice(0, 6), "nothing_yet"); },
  renew: () => { charts = []; $("charts").replaceChildren(); } };

// Requests that are over.
function statusChip(one) {
  const kind = one.status === 499 ? "warn" : one.status >= 400 ? "bad" : "good";
  return make("span.chip", { class: "chip " + kind, title: one.error || null }, one.status === 499 ?
    say("status_left") : String(one.status));
}
const RECENT_COLUMNS = [
  { key: "time", class: "fixed", of: (one) => moment(one.at, { second: "2-digit" }) },
  { key: "model", class: "wide", of: (one) => make("button.text", { type: "button",
    "aria-haspopup": "dialog", click: (event) => { event.stopPropagation(); showRecord(one); } },
  one.model || one.asked || "–") },
  { key: "status", of: statusChip },
  { key: "client", of: (one) => one.client + " · " + one.api },
  { key: "key", class: "mono rare", of: (one) => one.key },
  { key: "tokens", class: "figure", of: (one) => (one.output === null ? "" :
    compact(one.input) + " → " + compact(one.output)) },
  { key: "first_event", class: "figure", short: true, of: (one) => span(one.first) },
  { key: "total", class: "figure end", of: (one) => span(one.total) }];
const tables = {};
function showRows(id, records, nothing) {
  if (!records.length) {
    delete tables[id];
    fill(id, empty(nothing));
    return;
  }
  const columns = named(RECENT_COLUMNS);
  if (!tables[id]) {
    tables[id] = { known: new WeakMap(), table: tableOf(columns, [], say("requests")) };
    fill(id, make("div.scroll", null, tables[id].table));
  }
  const known = tables[id].known;
  settle(tables[id].table.tBodies[0], records.map((one) => {
    if (!known.has(one)) {
      known.set(one, rowOf(columns, one, { class: "open", click: () => showRecord(one) }));
    }
    return known.get(one);
  }));
}
const WORDED = { at: day, first: span, total: span, cost: money, input: figure, output: figure,
  cached: figure, reasoning: figure, stream: (value) => say(value ? "yes" : "no"),
  notes: (value) => make("ul", null, value.split("; ").map((part) => make("li", null, part))) };
function showRecord(one) {
  const shownAs = (name, value) => (value === null || value === "" ? "–" :
    (WORDED[name] || String)(value));
  const dialog = make("dialog.stack", { "aria-label": say("request"), id: "record" },
    make("div.heading", null, make("h2", null, say("request"), " ", statusChip(one)),
      make("button", { type: "button", click: () => dialog.close() }, say("close"))),
    one.error && make("p.banner.bad", null, one.error),
    pairs(Object.entries(one).map(([name, value]) => [say(WORDS.en["field_" + name] ?
      "field_" + name : name), shownAs(name, value)])),
    one.trace && make("div.row", null, make("button", { type: "button",
      click: () => copy(one.trace) }, say("copy_trace"))));
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  open(dialog);
}

// The filter: text, and choices made of what there is.
const STATUS_TESTS = { ok: (status) => status < 400, failed: (status) => status >= 400 &&
  status !== 499, left: (status) => status === 499 };
const CHOICES = { model: (one) => one.model || one.asked, client: (one) => one.client,
  api: (one) => one.api };
let mostShown = 100;
// Whether a text holds every word of a search field.
const holdsAll = (id, text) => $(id).value.toLowerCase().split(/\s+/)
  .every((word) => text.toLowerCase().includes(word));
function offer(id, rows) {
  const select = $(id), chosen = select.value;
  const now = JSON.stringify(rows);
  if (select.dataset.rows === now) return;
  select.dataset.rows = now;
  select.replaceChildren(...rows.map(([value, text]) => make("option", { value }, text)));
  select.value = rows.some(([value]) => value === chosen) ? chosen : rows[0] ? rows[0][0] : "";
}
function offerChoices() {
  offer("filter-status", [["", say("all")], ...Object.keys(STATUS_TESTS).map((name) =>
    [name, say("status_" + name)])]);
  for (const [name, value] of Object.entries(CHOICES)) {
    const known = [...new Set(shared.recent.map(value))].filter(Boolean).sort();
    offer("filter-" + name, [["", say("all")], ...known.map((one) => [one, one])]);
  }
}
function wanted() {
  const status = STATUS_TESTS[$("filter-status").value];
  return shared.recent.filter((one) => (!status || status(one.status)) &&
    Object.entries(CHOICES).every(([name, value]) => ["", value(one)].includes(
      $("filter-" + name).value)) && holdsAll("filter-text", Object.values(one).join("\n")));
}
views.requests = {
  show: () => {
    offerChoices();
    const found = wanted();
    put("shown", say("shown", { count: figure(found.length), of: figure(shared.recent.length) }));
    showRows("recent", found.slice(0, mostShown), shared.recent.length ? "nothing_fits" :
      "nothing_yet");
    $("more").hidden = found.length <= mostShown;
  },
  renew: () => { delete tables.recent; delete tables.latest; } };
$("filters").addEventListener("input", refresh);
$("more").addEventListener("click", () => { mostShown += 100; refresh(); });
"""


# === PAGE SETTINGS (pure) ===================================================
# Models with their switches, and the configuration: every option with its
# value and source, edited as a whole.  A refusal is said at its field.

PAGE_SETTINGS = r"""
// Reading what a page shows; what stands in the way is said where it would be.
async function load(id, path, then) {
  try { then(await read(path)); } catch (error) { fill(id, warn(error)); }
}
// Doing what a button asks for; a refusal is said and nothing else happens.
async function attempt(work) {
  try { return await work(); } catch (error) { toast(error.message); return null; }
}
const canWrite = () => Boolean(shared.state && shared.state.admin_key);
const editable = () => canWrite() && shared.config.writable;
const writeNotes = () => shared.state && !canWrite() &&
  make("p.banner.info", null, say("no_admin_key"));

// Models: what they can, and a switch.
const MODEL_COLUMNS = [
  { key: "on", class: "lead", of: (one) => make("input.switch", { type: "checkbox", role: "switch",
    checked: one.enabled, disabled: !canWrite(), "aria-label": one.id,
    change: (event) => switchModel(one, event.target) }) },
  { key: "model", class: "wide", of: (one) => [make("span.model", null, one.name || one.id),
    one.name && one.name !== one.id && make("div.dim.small", null, one.id)] },
  { key: "context", class: "figure", short: true, of: (one) => compact(one.context) },
  { key: "max_output", class: "figure", short: true, of: (one) => compact(one.max_output) },
  { key: "vision", short: true, of: (one) => say(one.vision ? "yes" : "no") },
  { key: "efforts", short: true, of: (one) => (one.efforts && one.efforts.length ?
    one.efforts.join(", ") : "–") },
  { key: "plan", short: true, of: (one) => one.plan || "–" },
  { key: "requests", class: "figure", short: true, of: (one) => figure(one.requests) }];
function showModels() {
  const found = shared.models.filter((one) => holdsAll("model-search", one.id + " " + one.name));
  fill("model-list", writeNotes(), found.length ? listOf(named(MODEL_COLUMNS), found,
    say("models"), (one) => ({ class: one.enabled ? null : "off" })) : empty("nothing_fits"));
}
async function switchModel(model, input) {
  const wanted = input.checked;
  const report = await attempt(async () => {
    const { options } = await read("/admin/config");
    const now = options.find((one) => one.name === "models").value || [];
    const rest = now.filter((one) => one.id.toLowerCase() !== model.id.toLowerCase());
    return write("PUT", "/admin/config", { models: wanted ? rest :
      [...rest, { id: model.id, enabled: false }] });
  });
  await views.models.load();
  if (!report) return;
  // An entry under another of its names may still switch it off.
  const now = shared.models.find((one) => one.id === model.id), winner = report.overridden.models;
  toast(winner ? say("overridden", { name: "models", source: winner }) :
    say(now && now.enabled ? "switched_on" : wanted ? "still_off" : "switched_off",
      { model: model.id }));
}
views.models = { load: () => load("model-list", "/admin/models", (data) => {
  shared.models = data.models;
  showModels();
}) };
$("model-search").addEventListener("input", showModels);

// Configuration: each option a row, what was edited is kept until it is saved or discarded.
const edits = new Map(), faults = new Map();
const toJson = (value) => JSON.stringify(value, null, 1);
const fromJson = (text) => { try { return JSON.parse(text); } catch { return text; } };
const fromNumber = (text) => (/^-?[0-9.]+$/.test(text.trim()) ? Number(text) : text);
const KINDS = {          // how a value is shown in a field, and what a field's text means
  list: [(value) => value.join(", "), (text) => text.split(",").map((one) => one.trim())
    .filter(Boolean)],
  map: [toJson, fromJson], models: [toJson, fromJson],
  int: [String, fromNumber], seconds: [String, fromNumber], number: [String, fromNumber] };
const textOf = (option, value) => (value === null || value === undefined ? "" :
  (KINDS[option.kind] || [String])[0](value));
function controlOf(option) {
  const id = "option-" + option.name, value = edits.has(option.name) ?
    edits.get(option.name) ?? option.default : option.value;
  const given = { id, disabled: !editable(), "aria-describedby": "help-" + option.name,
    class: faults.has(option.name) ? "wrong" : null };
  if (option.kind === "bool") {
    return make("input.switch", { ...given, class: "switch", type: "checkbox", role: "switch",
      checked: Boolean(value), change: (event) => edit(option, event.target.checked) });
  }
  if (option.kind === "choice") {
    return make("select", { ...given, change: (event) => edit(option, event.target.value) },
      option.choices.map((one) => make("option", { value: one, selected: one === value }, one)));
  }
  const parse = (KINDS[option.kind] || [])[1] || ((text) => text);
  return make(["map", "models"].includes(option.kind) ? "textarea" : "input", { ...given,
    value: option.secret ? edits.get(option.name) ?? "" : textOf(option, value),
    type: option.secret ? "password" : null, autocomplete: option.secret ? "new-password" : "off",
    spellcheck: "false", placeholder: option.secret ? say(option.set ? "is_set" : "is_unset") :
      null,
    inputmode: KINDS[option.kind] && parse === fromNumber ? "decimal" : null,
    input: (event) => edit(option, parse(event.target.value)) });
}
function edit(option, value) {
  const same = option.secret ? value === "" : toJson(value) === toJson(option.value);
  if (same) edits.delete(option.name); else edits.set(option.name, value);
  faults.delete(option.name);
  showChanges();
}
const inFile = (option) => !/^(default$|--|environment )/.test(option.source);
function optionRow(option) {
  const { name } = option, fault = faults.get(name), own = inFile(option);
  const fixed = !own && option.source !== "default";
  return make("div.option", { id: "row-" + name }, make("div.stack.small", null,
    make("div.row", null, make("label", { for: "option-" + name }, make("code", null, name)),
      option.at_start && make("span.chip", null, say("at_start")),
      own && make("span.chip.info", null, say("from_file")),
      fixed && make("span.chip.warn", null, say("set_by", { source: option.source }))),
    make("p.dim", { id: "help-" + name }, option.help)),
  make("div.stack.small", null, controlOf(option), fault && make("p.fault", { role: "alert" },
    fault), make("div.row.dim", null, !option.secret && make("span", null, say("default_is"), " ",
    make("code", null, textOf(option, option.default) || "–")), own && editable() &&
      make("button.quiet", { type: "button", click: () => {
        edits.set(name, null);
        faults.delete(name);
        showOptions();
      } }, say("reset")))));
}
function showOptions() {
  if (!shared.config) return;
  const { file, options, restart } = shared.config;
  put("config-file", file ? say(shared.config.writable ? "config_in" : "config_fixed", { file }) :
    say("no_config_file"));
  fill("options", options.filter((one) => holdsAll("option-search", one.name + " " + one.help))
    .map(optionRow));
  $("restart").disabled = !canWrite() || !restart;
  showChanges();
}
function showChanges() {
  $("savebar").hidden = !edits.size;
  put("changes", edits.size ? say("changes", { count: edits.size, names: [...edits.keys()]
    .join(", ") }) : "");
}
function showReport(report) {
  const rows = [report.applied.length && ["good", say("applied", { names: report.applied
    .join(", ") })], report.restart_needed.length && ["", say("restart_needed", {
    names: report.restart_needed.join(", ") })], ...Object.entries(report.overridden)
    .map(([name, source]) => ["", say("overridden", { name, source })]),
  ...(report.warnings || []).map((text) => ["", text])];
  fill("config-notes", rows.filter(Boolean).map(([kind, text]) =>
    make("p", { class: "banner " + kind }, text)));
}
async function saveOptions() {
  faults.clear();
  try {
    const report = await write("PUT", "/admin/config", Object.fromEntries(edits));
    edits.clear();
    showReport(report);
    shared.config = await read("/admin/config");
  } catch (error) {
    const known = shared.config.options.some((one) => one.name === error.param);
    if (known) faults.set(error.param, error.message);
    fill("config-notes", warn(error));
  }
  showOptions();
  const [wrong] = faults.keys();
  if (wrong && $("option-" + wrong)) $("option-" + wrong).focus();
}
async function restart() {
  const seconds = shared.config.options.find((one) => one.name === "drainSeconds").value;
  const note = say("restart_note", { seconds });
  if (!await ask(say("restart"), note, [], say("restart"), true)) return;
  if (await attempt(() => write("POST", "/admin/restart"))) toast(say("restarting"));
}
views.settings = {
  load: () => load("options", "/admin/config", (data) => {
    shared.config = data;
    fill("config-notes", writeNotes(), (data.restart_needed || []).length > 0 && make("p.banner",
      null, say("restart_needed", { names: data.restart_needed.join(", ") })));
    showOptions();
  }) };
$("config-form").addEventListener("submit", saveOptions);
$("option-search").addEventListener("input", showOptions);
$("restart").addEventListener("click", restart);
$("discard").addEventListener("click", () => { edits.clear(); faults.clear(); showOptions(); });
"""


# === PAGE KEYS (pure) =======================================================
# Where a caller stands, by a key that is pasted and never stored; and the
# operator's keys, of which only names come here.

PAGE_KEYS = r"""
// An account: what is left, its windows, what it must spend.  Used for a caller's own key and for
// the operator's.
const WINDOWS = ["five_hour", "weekly"], CREDITS = ["monthly", "free", "purchased"];
const STATE_CHIPS = { usable: "good", refused: "bad", skipped: "bad" };
function windowPart(name, window) {
  if (!window) return null;
  const used = window.cap_usd ? (window.used_usd || 0) / window.cap_usd : null;
  const kind = window.exceeded || used >= 1 ? "bad" : used > 0.8 ? "warn" : null;
  return make("div.stack.small", null, make("div.between", null, make("span", null, say(name)),
    make("span", null, money(window.used_usd), " / ", money(window.cap_usd), " · ",
      percent(used))),
  meter(used, kind, say(name) + " " + percent(used)), window.resets_at &&
    make("p.dim", null, say("resets"), " ", until(window.resets_at)));
}
function accountPart(account) {
  if (!account) return [make("p.dim", null, say("no_figures"))];
  const credits = account.credits_usd, windows = account.windows || {};
  return [make("div", null, make("p.dim.small", null, say("balance")),
    make("p.big", null, money(credits.balance))),
  ...WINDOWS.map((name) => windowPart("window_" + name, windows[name])),
  pairs([...CREDITS.map((name) => credits[name] !== null && [say("credit_" + name),
    money(credits[name])]), [say("burn"), account.burn_usd_per_day === null ? "–" :
    say("a_day", { amount: money(account.burn_usd_per_day) })],
  account.period_end && [say("period_end"), until(account.period_end)],
  [say("figures_age"), say("ago", { span: span(Math.max(1, account.age_seconds)) })]])];
}
function keyCard(entry, buttons) {
  const { through_proxy: through, account } = entry, name = entry.id || entry.name;
  const chip = entry.enabled === false ? ["", say("key_off")] :
    [STATE_CHIPS[entry.state] || "", say("state_" + entry.state)];
  return make("article.card.stack", { "aria-label": name || entry.key },
    make("div.between", null, make("div", null, make("h3", null, name || entry.key), name &&
      make("p.mono.dim", null, entry.key)), make("div.row", null, account && account.plan &&
      make("span.chip.info", null, account.plan), make("span", { class: "chip " + chip[0] },
      chip[1]))),
    entry.reason && make("p.banner.bad", null, say(entry.reason),
      entry.fit_at && [" · ", until(entry.fit_at)]),
    accountPart(account),
    pairs([[say("through"), say("through_proxy", { requests: figure(through.requests),
      failures: figure(through.failures), input: compact(through.input_tokens),
      output: compact(through.output_tokens), cost: money(through.cost_usd) })],
    [say("weight"), figure(entry.weight, 2)], entry.in_flight > 0 && [say("in_flight"),
      figure(entry.in_flight)], entry.max_in_flight && [say("max_in_flight"),
      figure(entry.max_in_flight)], (entry.allowed_models || []).length > 0 &&
      [say("allowed_models"), entry.allowed_models.join(", ")]]), buttons);
}

// Where a caller stands: the key is in this variable until it is forgotten or the page closes.
let ownKey = "", ownUsage = null;
function showUsage() {
  $("forget").hidden = !ownKey;
  if (!ownUsage) { fill("usage"); return; }
  fill("usage", ownUsage.keys_of === "operator" && make("p.banner.info", null,
    say("operators_own")), make("div.grid", null, ownUsage.keys.map((entry) => keyCard(entry))));
}
async function lookUp() {
  const given = $("own-key").value.trim();
  $("own-key").value = "";
  ownKey = given || ownKey;
  if (!ownKey) { $("own-key").focus(); return; }
  const used = ownKey;
  fill("usage", empty("asking"));
  try {
    const usage = await call("GET", "/v1/usage", undefined, used);
    if (used === ownKey) ownUsage = usage;
  } catch (error) {
    ownKey = ownUsage = null;
    showUsage();
    fill("usage", warn(error));
    return;
  }
  showUsage();
}
function forget() {
  ownKey = "";
  ownUsage = null;
  $("own-key").value = "";
  showUsage();
  $("own-key").focus();
}
$("usage-form").addEventListener("submit", lookUp);
$("forget").addEventListener("click", forget);

// The operator's keys: shown by their names, changed with the adminKey.
let operator = null;
function keyFields(entry) {
  return [{ name: "id", label: say("key_id"), value: entry?.id },
    !entry && { name: "apiKey", label: say("key"), type: "password", hint: "user_…" },
    { name: "weight", label: say("weight"), value: entry ? entry.weight : 1 },
    { name: "maxInFlight", label: say("max_in_flight"), value: entry?.max_in_flight || 0 },
    { name: "allowedModels", label: say("allowed_models"), hint: say("models_hint"),
      value: (entry?.allowed_models || []).join(", ") }].filter(Boolean);
}
// Only what a person changed is sent.
function keyChanges(entry, given) {
  const wanted = { ...given, weight: fromNumber(given.weight),
    maxInFlight: fromNumber(given.maxInFlight), allowedModels: KINDS.list[1](given.allowedModels) };
  const before = entry && { id: entry.id, weight: entry.weight,
    maxInFlight: entry.max_in_flight || 0, allowedModels: entry.allowed_models || [] };
  return Object.fromEntries(Object.entries(wanted).filter(([name, value]) => !before ||
    toJson(value) !== toJson(before[name])));
}
const keyPath = (entry) => "/admin/keys/" + encodeURIComponent(entry.id);
async function changeKey(method, path, body, told) {
  const done = await attempt(() => write(method, path, body));
  if (done) toast(told);
  views.keys.load();
}
async function addKey() {
  const given = await ask(say("add_key"), say("add_key_note"), keyFields(null), say("add_key"));
  if (given) await changeKey("POST", "/admin/keys", keyChanges(null, given), say("key_added"));
}
async function editKey(entry) {
  const given = await ask(say("edit"), entry.key, keyFields(entry), say("save"));
  const changes = given && keyChanges(entry, given);
  if (changes && Object.keys(changes).length) {
    await changeKey("PATCH", keyPath(entry), changes, say("key_changed"));
  }
}
async function deleteKey(entry) {
  const note = say("delete_note", { name: entry.id });
  if (!await ask(say("delete"), note, [], say("delete"), true)) return;
  await changeKey("DELETE", keyPath(entry), undefined, say("key_deleted"));
}
function keyButtons(entry) {
  const disabled = !canWrite() || !operator.file;
  return make("div.row", null, make("label.row", null, make("input.switch", { type: "checkbox",
    role: "switch", checked: entry.enabled, disabled, change: (event) => changeKey("PATCH",
      keyPath(entry), { enabled: event.target.checked }, say("key_changed")) }),
  make("span.small", null, say("in_use"))), make("button", { type: "button", disabled,
    click: () => editKey(entry) }, say("edit")), make("button.danger", { type: "button", disabled,
    click: () => deleteKey(entry) }, say("delete")));
}
function showOperator() {
  if (!operator) return;
  $("add-key").disabled = !canWrite() || !operator.file;
  fill("operator", writeNotes(), !operator.file && make("p.banner.info", null, say("no_key_file")),
    operator.file && make("p.note", null, say("keys_in", { file: operator.file,
      policy: operator.policy })),
    operator.keys.length ? make("div.grid", null, operator.keys.map((entry) =>
      keyCard(entry, keyButtons(entry)))) : empty("no_keys"));
}
views.keys = { load: () => {
  showUsage();
  return load("operator", "/admin/keys", (data) => { operator = data; showOperator(); });
} };
$("add-key").addEventListener("click", addKey);
"""


# === PAGE CLIENTS (pure) ====================================================
# Snippets that connect a client, with the address and a chosen model in them:
# what the README's Clients section says.

PAGE_CLIENTS = r"""
const KEY = "COMMANDCODE_KEY";
const plain = (text) => /^[\w@%+=:,./-]+$/.test(text);
const quote = JSON.stringify;
const quoted = (text, inner) => "'" + text.replaceAll("'", inner) + "'";
const SHELLS = {
  sh: { set: (name, value) => `export ${name}=${value}`, variable: "$" + KEY, key: `"$${KEY}"`,
    quoted: (text) => quoted(text, "'\\''"), word: (text) => (plain(text) ? text :
      SHELLS.sh.quoted(text)), curl: "curl ", on: " \\" },
  ps: { set: (name, value) => `$env:${name} = ${value}`, variable: "$env:" + KEY,
    key: "$env:" + KEY, quoted: (text) => quoted(text, "''"), word: (text) => quoted(text, "''"),
    curl: "curl.exe ", on: " `" } };
function claudeNames(model) {
  const names = /^claude/i.test(model) ? [] : ["OPUS", "SONNET", "HAIKU", "FABLE"];
  return ["ANTHROPIC_MODEL", ...names.map((name) => "ANTHROPIC_DEFAULT_" + name + "_MODEL")];
}
// Each: its name, its run command's name, what to know, and the text.  `url` and `id` are quoted.
const SNIPPETS = [
  ["Claude Code", "claude", "to_shell", ({ base, model, shell }) => [
    shell.set("ANTHROPIC_BASE_URL", shell.word(base)),
    shell.set("ANTHROPIC_AUTH_TOKEN", shell.key),
    ...claudeNames(model).map((name) => shell.set(name, shell.word(model))), "claude"]],
  ["Codex", "codex", "to_codex", ({ url, id }) => [
    "model = " + id, 'model_provider = "ccproxy"', "", "[model_providers.ccproxy]",
    'name = "ccproxy"', "base_url = " + url, `env_key = "${KEY}"`, 'wire_api = "responses"']],
  ["opencode", "opencode", "to_opencode", ({ base, model }) => [JSON.stringify({ provider: {
    ccproxy: { npm: "@ai-sdk/openai-compatible", options: { baseURL: base + "/v1",
      apiKey: "{env:" + KEY + "}" }, models: { [model]: {} } } },
  model: "ccproxy/" + model }, null, 2)]],
  ["Cursor", "", "to_cursor", ({ base, model }) => [
    "Override OpenAI Base URL   " + base + "/v1", "OpenAI API Key             user_...",
    "Model                      " + model]],
  ["aider", "aider", "to_shell", ({ base, model, shell }) => [
    shell.set("OPENAI_API_BASE", shell.word(base + "/v1")),
    shell.set("OPENAI_API_KEY", shell.key), "aider --model " + shell.word("openai/" + model)]],
  ["llm", "llm", "to_llm", ({ model, shell, url, id }) => [
    "# extra-openai-models.yaml", "- model_id: " + id, "  model_name: " + id, "  api_base: " + url,
    "  api_key_name: ccproxy", "", "# " + say("then"), "llm keys set ccproxy --value " + shell.key,
    "llm -m " + shell.word(model) + ' "Hi"']],
  ["OpenAI SDK (Python)", "", "pip install openai", ({ url, id }) => [
    "import os", "from openai import OpenAI", `client = OpenAI(base_url=${url},`,
    `                api_key=os.environ["${KEY}"])`, "answer = client.chat.completions.create(",
    `    model=${id},`, '    messages=[{"role": "user", "content": "Hi"}])',
    "print(answer.choices[0].message.content)"]],
  ["Anthropic SDK (Python)", "", "pip install anthropic", ({ base, id }) => [
    "import os", "from anthropic import Anthropic", `client = Anthropic(base_url=${quote(base)},`,
    `                   api_key=os.environ["${KEY}"])`, "answer = client.messages.create(",
    `    model=${id}, max_tokens=1000,`, '    messages=[{"role": "user", "content": "Hi"}])',
    "print(answer.content[-1].text)"]],
  ["OpenAI SDK (JavaScript)", "", "npm install openai", ({ url, id }) => [
    'import OpenAI from "openai";', `const client = new OpenAI({ baseURL: ${url},`,
    `  apiKey: process.env.${KEY} });`, "const answer = await client.chat.completions.create({",
    `  model: ${id},`, '  messages: [{ role: "user", content: "Hi" }] });',
    "console.log(answer.choices[0].message.content);"]],
  ["Anthropic SDK (JavaScript)", "", "npm install @anthropic-ai/sdk", ({ base, id }) => [
    'import Anthropic from "@anthropic-ai/sdk";',
    `const client = new Anthropic({ baseURL: ${quote(base)},`, `  apiKey: process.env.${KEY} });`,
    "const answer = await client.messages.create({", `  model: ${id}, max_tokens: 1000,`,
    '  messages: [{ role: "user", content: "Hi" }] });',
    "console.log(answer.content.at(-1).text);"]],
  ["curl", "", "to_shell", ({ base, model, shell }) => [
    shell.curl + shell.word(base + "/v1/chat/completions") + shell.on,
    `  -H "Authorization: Bearer ${shell.variable}" -H "Content-Type: application/json"` + shell.on,
    "  -d " + shell.quoted(quote({ model, messages: [{ role: "user", content: "Hi" }] }))]]];
function snippetCard([name, runs, note, text], wanted) {
  const code = text(wanted).join("\n");
  const local = /^https?:\/\/(127\.|localhost|\[::1\])/.test(wanted.base);
  return make("article.card.stack", { "aria-label": name }, make("div.heading", null,
    make("h3", null, name), make("button", { type: "button", click: () => copy(code),
      "aria-label": say("copy") + ": " + name }, say("copy"))), make("p.note", null, say(note)),
  make("pre", { tabindex: "0" }, make("code", null, code)), runs && local && make("p.note", null,
    say("or_run"), " ", make("code", null, "python3 ccproxy.py run " + runs + " --model " +
      wanted.shell.word(wanted.model))));
}
function showSnippets() {
  const base = ($("address").value.trim() || location.origin).replace(/\/+$/, "");
  const model = $("pick-model").value || "default", shell = SHELLS[$("shell").value];
  const wanted = { base, model, shell, url: quote(base + "/v1"), id: quote(model) };
  fill("snippets", SNIPPETS.map((snippet) => snippetCard(snippet, wanted)));
}
views.connect = {
  early: () => {
    if (!$("address").value) $("address").value = location.origin;
    showSnippets();
  },
  load: () => load("snippets", "/admin/models", (data) => {
    shared.models = data.models;
    offer("pick-model", data.models.filter((one) => one.enabled).map((one) => [one.id, one.id]));
    showSnippets();
  }),
  renew: showSnippets };
if (/Windows/.test(navigator.userAgent)) $("shell").value = "ps";
$("connect-form").addEventListener("input", showSnippets);
"""


# === PAGE (pure) ============================================================
# The dashboard's parts joined into one page, and the policy under which a browser
# may show it: this one style, this one script, this address, nothing else.

PAGE_LANGUAGES = ("en", "ko", "zh")
PAGE_PARTS = (PAGE_SCRIPT, PAGE_FRAME, PAGE_REQUESTS, PAGE_SETTINGS, PAGE_KEYS, PAGE_CLIENTS)


class Page(NamedTuple):
    """The dashboard as it is served, and the fields that go with it."""

    body: bytes
    fields: List[Tuple[str, str]]


def page_words(text: str) -> Dict[str, Dict[str, str]]:
    """The words of each language by their keys.  Raises ValueError for an odd row."""
    rows = re.split(r"\n| \|\| ", re.sub(r"\n +", " ", text.strip()))
    words: Dict[str, Dict[str, str]] = {language: {} for language in PAGE_LANGUAGES}
    for row in rows:
        key, _, given = row.partition(":")
        texts = [one.strip() for one in given.split(" | ")]
        if len(texts) != len(PAGE_LANGUAGES) or not all(texts) or key in words["en"]:
            raise ValueError("PAGE WORDS: " + row)
        for language, one in zip(PAGE_LANGUAGES, texts):
            words[language][key] = one
    return words


def source_hash(text: str) -> str:
    """How a policy names an inline style or script."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return "'sha256-%s'" % digest


def page_policy(style: str, script: str) -> str:
    """The Content-Security-Policy of a page that has this one style and this one script."""
    rules = {"default-src": "'none'", "script-src": source_hash(script),
             "style-src": source_hash(style), "connect-src": "'self'", "img-src": "data:",
             "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'",
             "require-trusted-types-for": "'script'", "trusted-types": "'none'"}
    return "; ".join("%s %s" % rule for rule in rules.items())


def page_script() -> str:
    """All of the script, in a scope of its own."""
    words = json.dumps(page_words(PAGE_WORDS), ensure_ascii=False, separators=(",", ":"))
    parts = ['"use strict";\n(() => {\nconst WORDS = %s;' % words.replace("<", "\\u003c"),
             *PAGE_PARTS, "startFrame();\n})();\n"]
    return "".join(parts)


def build_page() -> Page:
    """The whole dashboard; it is made when it is first asked for."""
    script = page_script()
    body = PAGE_MARKUP.lstrip().replace("@STYLE@", PAGE_STYLE).replace("@SCRIPT@", script)
    return Page(body.encode(), [
        ("content-type", "text/html; charset=utf-8"),
        ("content-security-policy", page_policy(PAGE_STYLE, script)),
        ("x-content-type-options", "nosniff"), ("referrer-policy", "no-referrer"),
        ("cache-control", "no-store")])


# === PART: RUNTIME ==========================================================
# === THE SHELL ==============================================================
# From here on the program talks to the world: it awaits, times, counts, logs
# and closes.  `App` is everything that changes while it runs; it is made once,
# in the command line's part, and passed on.  There are no other globals.


@dataclass
class App:
    """All state of a running proxy.  Every collection in it is bounded: by open connections, by
    `Limits`, by the list of models, by MAX_FAMILIES or MAX_ITEMS."""

    config: Config
    limits: Limits
    log: logging.Logger
    home: "Backend"                             # Command Code
    receive: memoryview                         # where every connection reads to, one at a time
    bare: bool = sys.platform != "win32"        # sockets are watched by ourselves, see SOCKETS
    wires: Set["Wire"] = field(default_factory=set)             # every open connection
    exchanges: Set["Exchange"] = field(default_factory=set)     # requests being served
    relays: Set["Relay"] = field(default_factory=set)           # answers being relayed
    tasks: Set["asyncio.Task[Any]"] = field(default_factory=set)
    clients: int = 0                            # open client connections
    refusals: int = 0                           # connections that were too many, closing
    max_clients: int = 0
    bodies: int = 0                             # bytes of request bodies in memory
    leaving: bool = False                       # told to stop; answers say `connection: close`
    draining: bool = False                      # no new requests are served
    restarting: bool = False                    # the program starts again when it has drained
    drain_within: float = float("inf")          # seconds for a restart's drain, if asked for fewer
    stop: Any = None                            # asyncio.Event: the proxy is to stop
    hurry: Any = None                           # asyncio.Event: and not to wait for anything
    server: Any = None                          # what listens
    sockets: List[socket.socket] = field(default_factory=list)  # given to listen on; []: bind
    restartable: bool = False                   # this process is a program of ours alone
    watched: Optional[Dict[str, Any]] = None    # see RESTART; None: nothing is watched
    ending: Any = None                          # future: what still runs is to end now
    demo_server: Any = None                     # the upstream inside the program
    started: float = 0.0                        # loop time
    cli_version: str = DEFAULT_CLI_VERSION
    vendors: Dict[str, "Backend"] = field(default_factory=dict)     # those that are on, by name
    tls: Optional[ssl.SSLContext] = None
    raiser: Any = None                          # guarded: a fault of ours becomes a ProxyError
    demo: bool = False                          # the upstream is the one inside the program
    items: Dict[Tuple[str, str], bytes] = field(default_factory=dict)   # see ITEM MEMORY
    operator: Operator = Operator()
    keys: KeyTable = field(default_factory=KeyTable)
    refreshes: Dict[str, "asyncio.Task[Any]"] = field(default_factory=dict)     # see ACCOUNTS
    rates: Dict[str, RateWindow] = field(default_factory=dict)
    guesses: Dict[str, Guesses] = field(default_factory=dict)   # wrong adminKeys, by address
    in_flight: int = 0                          # answers being made
    recent: Deque[Record] = field(default_factory=lambda: deque(maxlen=MAX_RECORDS))
    listeners: List[Callable[[Record], None]] = field(default_factory=list)     # to new records
    minutes: Minutes = field(default_factory=dict)              # see HISTORY
    followers: Set[Any] = field(default_factory=set)            # see LIVE EVENTS
    watching: Any = None                        # the task that looks for changes, for them
    telling: Any = None                         # the listener that tells them of records
    numbered: int = 0                           # requests that were shown while they ran
    metrics: Metrics = field(default_factory=Metrics)
    usage: Any = None                           # UsageLog
    settings: Any = None                        # Settings: where the configuration came from
    changing: Any = None                        # asyncio.Lock: one change of a file at a time
    version_task: Optional["asyncio.Task[Any]"] = None      # asks npm for cliVersion
    alerts: List[Json] = field(default_factory=list)    # that stand now, oldest first
    page: Optional[Page] = None                 # the dashboard, once it was asked for


SECRET_OPTIONS = [place for place, option in enumerate(OPTIONS)
                  if option.kind == "secret" and not option.lent]


def held_secrets(app: App) -> List[str]:
    """Every secret that the program holds."""
    found = [app.config[place] for place in SECRET_OPTIONS if app.config[place]]
    for way in {one.proxy_authorization for one in (app.home, *app.vendors.values())} - {""}:
        basic = way.partition(" ")[2]
        password = base64.b64decode(basic).decode().partition(":")[2]
        found += [basic, password] if password else [basic]
    found += [backend.key.key for backend in app.vendors.values() if backend.key]
    return found + [key.key for key in app.operator.keys]


def spawn(app: App, work: Any) -> "asyncio.Task[Any]":
    """Start a task that the app owns: it is cancelled when the proxy stops."""
    task = asyncio.get_running_loop().create_task(work)
    app.tasks.add(task)
    task.add_done_callback(app.tasks.discard)
    return task


def stopping_error() -> ProxyError:
    return ProxyError("busy", "The proxy is shutting down.", retry_after=1)


async def within(app: App, seconds: float, work: Any) -> Any:
    """Await work for at most so long.  Raises asyncio.TimeoutError, and ProxyError `busy` when the
    proxy ends before.  (asyncio.wait_for can lose a cancellation in Python before 3.12.)"""
    task = spawn(app, work)
    task.add_done_callback(lambda one: one.cancelled() or one.exception())     # seen by somebody
    try:
        await asyncio.wait([task, app.ending], timeout=seconds,
                           return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if app.ending.done():
            raise stopping_error()
        raise asyncio.TimeoutError
    finally:
        task.cancel()


def random_hex(digits: int) -> str:
    return os.urandom((digits + 1) // 2).hex()[:digits]


# === SETTINGS ===============================================================
# Where the configuration comes from: the file, the environment, the operator's
# keys; and the log that it asks for.  It can be read again while the program
# runs, so all that is wrong with it is a ProxyError, and nothing ends here.


PATH_OPTIONS = ("logFile", "usageDb", "credentialsFile")
FROM_ENV_FILE = "CCPROXY_ENV_FILE"      # a variable: the names of those that --env-file gave


@dataclass(frozen=True)
class Settings:
    """A configuration and all that it was read from."""

    config: Config
    sources: Dict[str, str]             # by option: where its value came from
    flags: Dict[str, str]               # by option
    file_name: str                      # of the config file, which may be absent
    entries: Json                       # of the config file
    operator: Operator = Operator()
    unused: str = ""                    # why the operator's keys lie unused
    given: Optional[str] = None         # --config
    fault: str = ""                     # what is wrong, where all is at its default therefore
    warnings: Tuple[str, ...] = ()      # about what is set and does not count
    env_file: str = ""                  # --env-file
    vendors: Tuple[Vendor, ...] = ()    # that are on

    @property
    def path(self) -> str:
        """Where the config file is, or would be; "" where the program is run by another."""
        return config_path(self.given) if self.file_name else ""


def read_settings(flags: Dict[str, str], given: Optional[str], env_file: str = "") -> Settings:
    """All settings, read whole and checked.  `given` is --config.  Raises ProxyError `config`, and
    leaves the environment as it was then."""
    before = dict(os.environ)
    try:
        load_env_file(env_file)
        file_name, entries = read_config_file(given)
        return replace(check_settings(flags, entries, file_name, given), env_file=env_file)
    except ProxyError:
        set_environment(before)
        raise


def check_settings(flags: Dict[str, str], entries: Json, file_name: str,
                   given: Optional[str]) -> Settings:
    """The settings that these entries of a config file make, with everything checked that the
    start asks for.  Raises ProxyError `config`."""
    config, sources = read_config(flags, os.environ, entries, file_name)
    config = place_paths(config, sources, file_name)
    path = config.credentials_file
    text = read_credentials_file(path)[1] if path else None
    more, strange = file_entries(text or "", path)
    for name in [name for name in more if sources[name] == "default"]:
        config, sources[name] = config._replace(**{snake_case(name): more[name]}), path
    check_admin_key(config)
    operator = read_operator(config, text)
    if sources["maxTotalInFlight"] == "environment " + MULTIPLIER:
        config = config._replace(max_total_in_flight=config.max_total_in_flight
                                 * len(operator.keys))
    vendors = vendors_on(config, os.environ)
    others = other_variables(os.environ)
    unknown = sorted(set(os.environ).difference(*others.values()))
    return Settings(config, sources, flags, file_name, entries, operator,
                    check_operator(operator, config.host), given,
                    warnings=(*removed_warnings(flags, os.environ, entries), *strange, *others,
                              *variable_warnings(unknown), *odd_key_warnings(operator),
                              *vendor_warnings(vendors, builtin_models())), vendors=vendors)


def place_paths(config: Config, sources: Dict[str, str], file_name: str) -> Config:
    """The configuration with its paths as they are opened: `~` is the home folder, and those of
    the config file count from its folder (others from the working directory)."""
    folder = os.path.dirname(os.path.abspath(file_name))
    for name in PATH_OPTIONS:
        path = os.path.expanduser(getattr(config, snake_case(name)))
        if path not in ("", "auto") and sources[name] == file_name:
            path = os.path.normpath(os.path.join(folder, path))
        config = config._replace(**{snake_case(name): path})
    return config


def set_environment(wanted: Mapping[str, str]) -> None:
    """Make the environment hold these variables alone."""
    for name in set(os.environ) - set(wanted):
        del os.environ[name]
    os.environ.update(wanted)


def load_env_file(path: str) -> None:
    """Put a `.env` file's variables into the environment, below those that are there; what the
    reading before put there goes, in a restarted program too.  Raises ProxyError `config`."""
    if not path:
        return
    try:
        with open(path, "rb") as file:
            text = os.fsdecode(file.read(MIB))
    except OSError as error:
        raise ProxyError("config", "--env-file %s: %s" % (path, error.strerror)) from None
    fresh = parse_env_file(text, path)
    earlier = os.environ.get(FROM_ENV_FILE, "").split()
    kept = {name: value for name, value in os.environ.items() if name not in earlier}
    fresh = {name: value for name, value in fresh.items() if name not in kept}
    set_environment({**kept, **fresh, FROM_ENV_FILE: " ".join(fresh)})


def config_path(given: Optional[str]) -> str:
    """Where the config file is, or would be."""
    return given or os.path.join(os.path.dirname(os.path.abspath(__file__)), "config.json")


def read_what_holds(flags: Dict[str, str], given: Optional[str], env_file: str = "") -> Settings:
    """All settings; where they are wrong, what is, and those without the config file, else the
    defaults: for who is to say so."""
    try:
        return read_settings(flags, given, env_file)
    except ProxyError as error:
        fault = error.message
    try:
        config, sources = read_config(flags, os.environ, {}, "")
    except ProxyError:
        config, sources = read_config({}, {}, {}, "")
    return Settings(config, sources, {}, "", {}, fault=fault)


def read_config_file(given: Optional[str]) -> Tuple[str, Json]:
    """(name, entries) of the config file; without --config it may be absent."""
    path = config_path(given)
    if given is None and not os.path.exists(path):
        return "config.json", {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            return path, decode_entries(file.read(), path)
    except OSError as error:
        raise ProxyError("config", "%s: %s" % (path, error.strerror)) from None
    except UnicodeDecodeError:
        raise ProxyError("config", "%s: is not UTF-8" % path) from None


def read_credentials_file(name: str) -> Tuple[str, str]:
    """(its name, its text).  Raises ProxyError `config`."""
    try:
        with open(name, encoding="utf-8") as file:
            return name, file.read(MIB)
    except (OSError, UnicodeDecodeError) as error:
        raise ProxyError("config", "credentials in %s: %s" % (
            name, getattr(error, "strerror", None) or "not UTF-8")) from None


def read_operator(config: Config, text: Optional[str] = None) -> Operator:
    """The operator's keys from the first source that holds any; `text` is what credentialsFile is
    to hold, where that is not written yet.  Raises ProxyError `config`."""
    sources = [] if not config.credentials_file else [
        read_credentials_file(config.credentials_file) if text is None
        else (config.credentials_file, text)]
    sources += [(name, os.environ[name]) for name in CREDENTIAL_VARIABLES if os.environ.get(name)]
    if config.client_key or config.operator_keys != "off":
        files = map(os.path.expanduser, CLI_FILES)
        sources += [read_credentials_file(name) for name in files if os.path.isfile(name)]
    source, keys = read_credentials(sources)
    return Operator(keys, config.client_key, config.operator_keys == "loopback", source)


def readable_by_others(name: str) -> bool:
    """Whether a file of keys is open to other accounts of this machine."""
    try:
        return os.name == "posix" and os.stat(name).st_mode & 0o077 != 0
    except OSError:
        return False


def warn(text: str) -> None:
    """Write to standard error, if there is one that takes it: a full disk has nobody to tell."""
    try:
        sys.stderr.write(text)
    except (OSError, AttributeError) as error:
        logging.getLogger("ccproxy").debug("standard error: %s", error)


def flush_output() -> None:
    """Write what is still held back, where that is possible."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):   # a closed pipe or full disk; no console
            pass


def lost_line(file_name: str) -> Callable[[logging.LogRecord], None]:
    """What to do about a line that cannot be written: a full disk costs log lines, never requests,
    and is said once on standard error."""
    said: List[str] = []

    def handle(record: logging.LogRecord) -> None:
        if file_name and not said:
            said.append("ccproxy: logFile %s: %s; lines are lost\n" % (
                file_name, sys.exc_info()[1]))
            warn(said[0])

    return handle


def file_handler(path: str) -> logging.FileHandler:
    """A log file that is opened anew when it was moved (not on Windows, where it cannot be moved
    while it is open).  Raises OSError."""
    if os.name != "posix":
        return logging.FileHandler(path, encoding="utf-8")
    from logging.handlers import WatchedFileHandler     # rarely wanted, so not at start
    return WatchedFileHandler(path, encoding="utf-8")


def reopen_log(log: logging.Logger) -> None:
    """Close the log file: the next line opens it anew, as log rotation expects after SIGHUP."""
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.close()


def redact_traceback(record: logging.LogRecord) -> bool:
    """Take what looks like a key out of a traceback: an exception may quote what it failed on."""
    if record.exc_info:
        record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
    return True


def open_log(config: Config) -> logging.Logger:
    """The log, with asyncio's own warnings in it.  Raises ProxyError for a file that cannot be
    written."""
    logging.addLevelName(logging.CRITICAL + 1, "SILENT")
    log = logging.getLogger("ccproxy")
    handler: logging.Handler = logging.StreamHandler()
    if config.log_file:
        try:
            handler = file_handler(config.log_file)
        except OSError as error:
            raise ProxyError("config", "logFile %s: %s" % (config.log_file, error.strerror)) \
                from None
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    handler.handleError = lost_line(config.log_file)
    handler.addFilter(redact_traceback)
    # What no line shows is not looked up for each (the logging HOWTO's "Optimization").
    logging._srcfile = None     # type: ignore[attr-defined]
    logging.logThreads = logging.logMultiprocessing = False
    logging.logAsyncioTasks = False     # type: ignore[attr-defined]    # from Python 3.12 on
    for logger in (log, logging.getLogger("asyncio")):
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(config.log_level.upper())
    return log


def check_log_file(path: str) -> None:
    """Raise ProxyError `config` where no log can be written."""
    place = os.path.dirname(os.path.abspath(path))
    words = "" if os.path.isdir(place) else \
        ", for there is no folder %s: make it, or choose another" % place
    if words or os.path.isdir(path) or not os.access(
            path if os.path.exists(path) else place, os.W_OK):
        raise ProxyError("config", "logFile %s: cannot be written%s" % (path, words),
                         param="logFile")


def check_surroundings(config: Config) -> None:
    """What a configuration needs of this machine.  A certificate file that is named but missing is
    said at start, not at the first request.  Raises ProxyError `config`."""
    path = os.environ.get("SSL_CERT_FILE")
    if path and not os.path.isfile(path):
        raise ProxyError("config", "environment SSL_CERT_FILE: there is no file %s" % path)
    if config.log_file:
        check_log_file(config.log_file)


# === SAFE FILES =============================================================
# Files that hold a person's settings, changed so that nothing is lost: one
# change at a time, on top of what the file says by then, and at once or not at
# all.  A link stays one.  The lock file of `x` is `.x.lock` beside it, there only
# while `x` is changed: all that share `x` find it, and may make it where they may
# replace `x`.  State folders differ by account, environment and systemd unit, so
# that two processes would hold two locks.

LOCK_SECONDS = 5.0          # another change takes milliseconds
Edit = Callable[[Optional[bytes]], Optional[bytes]]     # of a file's content, None for no file


def open_lock(path: str, target: str) -> int:
    """A descriptor of a lock file, made where there is none.  Raises OSError."""
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
    try:
        number = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return os.open(path, flags)
    try:
        if os.name == "posix" and os.geteuid() == 0:    # root leaves it the owner of the file
            os.fchown(number, os.stat(target).st_uid, os.stat(target).st_gid)
    except OSError:         # there is no file yet, or this root may not
        pass
    return number


def try_lock(number: int, path: str) -> bool:
    """Whether a lock file is ours from now until it is closed, as it is when its process dies; on a
    file system without locks it is everybody's."""
    try:
        if sys.platform == "win32":
            import msvcrt
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(number), os.lstat(path))
    except (BlockingIOError, PermissionError, FileNotFoundError):   # held, or just removed
        return False
    except OSError:
        return True


def take_lock(path: str, target: str) -> int:
    """A descriptor that keeps other changes of a file waiting until `drop_lock`; -1 in a folder
    where nothing can be written.  Raises OSError."""
    deadline = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            number = open_lock(path, target)
            if try_lock(number, path):
                return number
            os.close(number)
        except OSError as error:    # removed just now, or another account's
            if not os.access(os.path.dirname(path), os.W_OK):
                return -1
            if error.errno not in (errno.ENOENT, errno.EACCES) and not os.path.lexists(path):
                raise
        time.sleep(0.001)   # a lock that is taken again and again is free for that long
    raise TimeoutError(errno.EBUSY, "another change has held the lock file %s for %g s: end the "
                       "process that makes it; where there is none, delete the lock file"
                       % (path, LOCK_SECONDS))


def drop_lock(number: int, path: str) -> None:
    """Remove a lock file while it is held: later it may be another's.  Windows removes no file that
    is open, and so no lock that anybody holds."""
    if sys.platform == "win32":
        os.close(number)
    try:
        os.unlink(path)
    except OSError:
        pass
    if sys.platform != "win32":
        os.close(number)


def replace_file(target: str, data: bytes, like: Optional[os.stat_result], mode: int) -> None:
    """Put data in a file's place at once, or change nothing.  Raises OSError."""
    import tempfile
    folder, name = os.path.split(target)
    number, fresh = tempfile.mkstemp(prefix=".%s." % name, dir=folder)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if os.name == "posix":      # by descriptor: the folder's owner may exchange the name
                if like is not None and os.geteuid() == 0:      # root leaves it its owner's
                    os.fchown(file.fileno(), like.st_uid, like.st_gid)
                os.fchmod(file.fileno(), mode)
        os.replace(fresh, target)
    except BaseException:
        os.unlink(fresh)
        raise


def put_file(target: str, old: Optional[bytes], new: Optional[bytes], mode: Optional[int],
             previous: bool) -> None:
    """Write or remove a file for `change_file`.  Raises OSError."""
    if new is None:
        os.unlink(target)
        return
    folder, name = os.path.split(target)
    like = None if old is None else os.stat(target)
    open_to = 0o770 if holds_secret((old or b"") + new) else 0o777
    kept = mode or (like.st_mode & open_to if like is not None else 0o600)
    if old and previous:
        replace_file(os.path.join(folder, ".%s.previous" % name), old, like, kept)
    replace_file(target, new, like, kept)


def change_file(path: str, edit: Edit, mode: Optional[int] = None, previous: bool = False,
                folder_mode: int = 0, after: Optional[Callable[[], None]] = None
                ) -> Optional[bytes]:
    """Give a file the content that `edit` makes of its present one, and return that one.  The mode
    is kept (but that other accounts read a secret option), unless one is given, as for keys.  With
    `previous` the old file is kept beside it as a hidden one, with `folder_mode` its folder is
    made; `after` is done before another change.  Raises ProxyError 409 where it cannot be written,
    and what edit does."""
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    lock_path, lock = os.path.join(folder, ".%s.lock" % name), -1
    try:
        if folder_mode:
            os.makedirs(folder, folder_mode, exist_ok=True)
        lock = take_lock(lock_path, target)
        old = None
        if os.path.exists(target):
            with open(target, "rb") as file:
                old = file.read()
        new = edit(old)
        if new != old:
            put_file(target, old, new, mode, previous)
        if after is not None:
            after()
        return old
    except OSError as error:
        raise ProxyError("invalid", "%s cannot be changed: %s.%s" % (
            path, error.strerror or error, "" if isinstance(error, TimeoutError) else
            " Nothing was; let the account that runs ccproxy write it and its folder, or change "
            "it by hand (a proxy reads its own files anew on SIGHUP)."), status=409) from None
    finally:
        if lock >= 0:
            drop_lock(lock, lock_path)


def read_file(path: str) -> Optional[bytes]:
    """A file's bytes; None for none.  Raises ProxyError `config`."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ProxyError("config", "%s: %s" % (path, error.strerror)) from None


def is_writable(path: str) -> bool:
    """Whether a change of a file has a chance."""
    target = os.path.realpath(path)
    return bool(path) and os.access(os.path.dirname(target), os.W_OK) and (
        not os.path.exists(target) or os.access(target, os.W_OK))


# === SOCKETS ================================================================
# A connection's socket, plain or TLS, watched by the loop itself: the part of
# asyncio's transports that a Wire uses, cheaper per event and in memory, above
# all for TLS, whose every record asyncio copies through two buffers more.
# Windows' loop cannot watch sockets (`App.bare`): there asyncio's own
# transports stand in the same place.

NOT_NOW = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def wake(waiter: Any) -> None:
    """Let whoever awaits a future go on."""
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


class Channel:
    """A connected socket that feeds a protocol and sends what it writes.  Its owner closes it."""

    __slots__ = ("loop", "sock", "number", "protocol", "out", "waiting", "most", "paused",
                 "closing", "blocked", "finishing", "waiter")

    def __init__(self, sock: socket.socket, protocol: asyncio.BufferedProtocol) -> None:
        self.loop = asyncio.get_running_loop()
        self.sock, self.protocol = sock, protocol
        self.number = sock.fileno()
        self.out: List[memoryview] = []             # what the socket did not take yet
        self.waiting = 0                            # bytes in `out`
        self.most = SEND_BYTES                      # for one call
        self.closing = False                        # nothing more is written or read
        self.blocked = False                        # more waits than should
        self.finishing = False                      # a FIN is to follow what waits
        self.waiter: Any = None                     # future: of the TLS handshake
        self.paused = True
        protocol.connection_made(self)              # type: ignore[arg-type]
        if not self.closing:
            self.resume_reading()

    def readable(self) -> None:
        """One read, at most as much as the protocol's buffer holds: fairness between streams."""
        protocol = self.protocol
        try:
            count = self.sock.recv_into(protocol.get_buffer(-1))
        except NOT_NOW:
            return
        except OSError:
            self.abort()
            return
        if not count:
            protocol.eof_received()
            self.close()
            return
        protocol.buffer_updated(count)
        if self.most == TLS_SEND_BYTES and not self.paused and self.sock.pending():
            self.loop.call_soon(self.read_rest)

    def read_rest(self) -> None:
        """Read what OpenSSL holds already: the loop cannot know of it."""
        if not self.paused:
            self.readable()

    def pause_reading(self) -> None:
        if not self.paused:
            self.paused = True
            self.loop.remove_reader(self.number)

    def resume_reading(self) -> None:
        if self.paused and not self.closing:
            self.paused = False
            self.loop.add_reader(self.number, self.readable)
            if self.most == TLS_SEND_BYTES and self.sock.pending():
                self.loop.call_soon(self.read_rest)

    def write(self, data: Union[bytes, memoryview]) -> None:
        """Send now what the socket takes, the rest when it is ready."""
        if self.closing:
            return
        if not self.out and len(data) <= self.most:     # nearly always
            try:
                sent = self.sock.send(data)
            except NOT_NOW:
                sent = 0
            except OSError:
                self.abort()
                return
            if sent == len(data):
                return
            data = memoryview(data)[sent:]
        self.out.append(memoryview(data))
        self.waiting += len(data)
        if len(self.out) == 1:
            self.loop.add_writer(self.number, self.flush)
        if self.waiting > HIGH_WATER_BYTES and not self.blocked:
            self.blocked = True
            self.protocol.pause_writing()

    def flush(self) -> None:
        """Send of what waits as much as the socket takes."""
        try:
            while self.out:
                piece = self.out[0]
                sent = self.sock.send(piece[:self.most])
                self.waiting -= sent
                if sent < len(piece):
                    self.out[0] = piece[sent:]
                else:
                    del self.out[0]
        except NOT_NOW:
            pass
        except OSError:
            self.abort()
            return
        if self.blocked and self.waiting <= LOW_WATER_BYTES:
            self.blocked = False
            self.protocol.resume_writing()
        if not self.out:
            self.loop.remove_writer(self.number)
            self.end_writing()

    def end_writing(self) -> None:
        """What was to follow the last byte: a FIN, or the end of it all."""
        if self.closing:
            self.loop.call_soon(self.lose)
        elif self.finishing:
            self.finishing = False
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:         # the other side has just gone
                self.abort()

    def can_write_eof(self) -> bool:
        return self.most != TLS_SEND_BYTES

    def write_eof(self) -> None:
        self.finishing = True
        if not self.out:
            self.end_writing()

    def is_closing(self) -> bool:
        return self.closing

    def get_extra_info(self, name: str) -> Any:
        """The address of the other side, `peername`, or of ours, `sockname`."""
        try:
            return self.sock.getpeername() if name == "peername" else self.sock.getsockname()
        except OSError:
            return None

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def close(self) -> None:
        """Read no more, send what waits, then let go."""
        if not self.closing:
            self.pause_reading()
            self.closing = True
            if not self.out:
                self.end_writing()

    def abort(self) -> None:
        """Let go now; what waits is lost."""
        if self.out:
            self.out.clear()
            self.waiting = 0
            if self.closing:        # `close` waited for that
                self.loop.call_soon(self.lose)
        self.close()

    def lose(self) -> None:
        """The end, once."""
        if self.number >= 0:
            self.loop.remove_reader(self.number)
            self.loop.remove_writer(self.number)
            self.number = -1
            self.sock.close()
            wake(self.waiter)
            self.protocol.connection_lost(None)
            del self.protocol       # each knows the other: a cycle would wait for the collector

    async def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """Go on over TLS, the server's name checked.  Raises OSError."""
        self.pause_reading()
        tls = context.wrap_socket(self.sock, server_hostname=host, do_handshake_on_connect=False)
        self.sock, self.most = tls, TLS_SEND_BYTES
        while not self.closing:
            try:
                tls.do_handshake()
                self.resume_reading()
                return
            except ssl.SSLWantReadError:
                await self.ready(self.loop.add_reader, self.loop.remove_reader)
            except ssl.SSLWantWriteError:
                await self.ready(self.loop.add_writer, self.loop.remove_writer)
        raise ConnectionAbortedError("closed in the middle of the TLS handshake")

    async def ready(self, watch: Callable[..., Any], forget: Callable[..., Any]) -> None:
        """Wait until the socket can be read (or written), or is closed."""
        self.waiter = self.loop.create_future()
        watch(self.number, wake, self.waiter)
        try:
            await self.waiter
        finally:
            if self.number >= 0:
                forget(self.number)


# === LISTENING AND CONNECTING ===============================================
# How sockets come to be: accepted, a few at a time, or connected, by name or by
# address, without ever blocking the loop.  `in_thread` is for what the system
# offers in no other way.


class Listener:
    """Listening sockets whose connections become Channels.  Its owner closes it."""

    def __init__(self, app: App, sockets: List[socket.socket],
                 protocol: Callable[[], asyncio.BufferedProtocol]) -> None:
        self.app, self.sockets, self.protocol = app, sockets, protocol
        self.loop = asyncio.get_running_loop()
        self.closed = False
        for sock in sockets:
            sock.listen(BACKLOG)
            sock.setblocking(False)
            self.watch(sock)

    def watch(self, sock: socket.socket) -> None:
        """Accept from now on, but not after the end."""
        if not self.closed:
            self.loop.add_reader(sock.fileno(), self.accept, sock)

    def accept(self, listening: socket.socket) -> bool:
        """Take some of the connections that wait; whether there may be more."""
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, _address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return False
            except OSError as error:        # out of descriptors or memory: a pause may help
                self.app.log.warning("connections wait for a second: %s", error.strerror)
                self.loop.remove_reader(listening.fileno())
                self.loop.call_later(1.0, self.watch, listening)
                return False
            set_options(sock)
            Channel(sock, self.protocol())
        return True

    def pause(self) -> None:
        """Accept no more; connections that come wait in the system, for whoever goes on."""
        self.closed = True
        for sock in self.sockets:
            self.loop.remove_reader(sock.fileno())

    def close(self) -> None:
        """Take the connections that wait already, then listen no more."""
        for sock in self.sockets if not self.closed else []:
            turns = BACKLOG // ACCEPTS_PER_TURN
            while self.accept(sock) and turns:
                turns -= 1
        self.pause()
        close_sockets(self.sockets)


def set_options(sock: socket.socket) -> None:
    sock.setblocking(False)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:         # it has gone already; reading will tell
        pass


def bind_sockets(host: str, port: int) -> List[socket.socket]:
    """Sockets bound to a port on all addresses of a host.  Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: List[socket.socket] = []
    failure = errno.EADDRNOTAVAIL
    for family, _, _, _, address in dict.fromkeys(found):
        chosen = sockets[0].getsockname()[1] if sockets else port
        try:
            sockets.append(socket.create_server((address[0], chosen, *address[2:]), family=family))
        except OSError as error:
            failure = error.errno or failure
            if failure not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):    # no IPv6 here, say
                close_sockets(sockets)
                raise OSError(failure, os.strerror(failure)) from None
    if not sockets:
        raise OSError(failure, os.strerror(failure))
    return sockets


def close_sockets(sockets: Iterable[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


async def open_listener(app: App, host: str, port: int,
                        protocol: Callable[[], asyncio.BufferedProtocol],
                        sockets: Iterable[socket.socket] = ()) -> Any:
    """Listen on all addresses of a host, or on the sockets that were given: an object with
    `sockets` and `close()`.  Raises OSError."""
    if not app.bare:
        return await asyncio.get_running_loop().create_server(protocol, host, port,
                                                              backlog=BACKLOG)
    return Listener(app, list(sockets) or bind_sockets(host, port), protocol)


def start_work(work: Callable[[], Any]) -> Any:
    """Begin blocking work in a thread that does not keep the program from ending: its future."""
    import threading
    from concurrent.futures import Future
    done: "Future[Any]" = Future()
    done.set_running_or_notify_cancel()     # from now on only `run` settles it

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:      # handed on to whoever awaits
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done


async def in_thread(work: Callable[[], Any]) -> Any:
    return await asyncio.wrap_future(start_work(work))


async def connect_socket(host: str, port: int) -> socket.socket:
    """A connection to the first address of a host that takes one.  Raises OSError."""
    loop = asyncio.get_running_loop()
    resolve = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    try:
        found = resolve(flags=socket.AI_NUMERICHOST)    # an address needs no thread
    except socket.gaierror:
        found = await in_thread(resolve)
    failure = OSError("no address of %s" % host)
    for family, kind, protocol, _, address in found:
        try:
            sock = socket.socket(family, kind, protocol)
            try:
                set_options(sock)
                await loop.sock_connect(sock, address)
                return sock
            except BaseException:       # also when nobody waits for it any more
                sock.close()
                raise
        except OSError as error:
            failure = error
    raise failure


# === SOCKETS HANDED ON ======================================================
# A restart is the same process that runs its program anew, so its listening
# sockets can stay open: connections that come meanwhile wait in them.  They are
# named in an environment variable, which the new program takes out, and looked
# at closely before they are believed.

HANDED_ON = "CCPROXY_SOCKETS"


def hand_on(sockets: Iterable[socket.socket], config: Config) -> None:
    """Leave sockets open for the program that this process runs next.  They are a list in a list:
    versions with several processes told one for each, and a restart may be an update from or to
    one of them."""
    numbers = [sock.fileno() for sock in sockets]
    for number in numbers:
        os.set_inheritable(number, True)
    os.environ[HANDED_ON] = json.dumps({
        "process": os.getpid(), "host": config.host, "port": config.port, "sockets": [numbers]})


def listening_socket(number: Any) -> Optional[socket.socket]:
    """The listening TCP socket with this descriptor; None where it is none."""
    if not isinstance(number, int) or number < 3:
        return None
    try:
        sock = socket.socket(fileno=number)
    except OSError:
        return None
    listens = sock.type == socket.SOCK_STREAM and sock.family in (
        socket.AF_INET, socket.AF_INET6) and sock.getsockopt(
            socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if not listens:
        sock.detach()           # somebody else's
        return None
    sock.set_inheritable(False)
    return sock


def take_over(config: Config) -> List[socket.socket]:
    """The sockets that the program before left open, where it listened as we are to; else []."""
    try:
        told = json.loads(os.environ.pop(HANDED_ON, "{}"))
        mine = told.get("process") == os.getpid()
        numbers = [number for group in told["sockets"] for number in group] if mine else []
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    sockets = [sock for sock in map(listening_socket, numbers) if sock is not None]
    if (told.get("host"), told.get("port")) != (config.host, config.port):
        close_sockets(sockets)
        return []
    return sockets


# === WIRE ===================================================================
# One connection, to a client or to an upstream.  Heads and bodies are read by
# awaiting `fill` and calling `take`.  For the length of one answer the relay
# sets `on_data` instead: bytes are then handled in the callback that brings
# them, without a task switch, a future or a timer per event.  Deadlines are
# looked at by one periodic sweep (SERVER), not by a timer each.  A callback has
# nobody to raise to, nor has a periodic task: `guarded` is for both.


class guarded:      # a class as contextlib.suppress is one: for work with and without `await`
    """Surrounds work that has nobody to raise to.  A fault of ours is logged with its traceback
    and handed to `end`, which ends what it befell; exceptions of the kinds `passed` go on."""

    __slots__ = ("app", "end", "passed")

    def __init__(self, app: App, end: Optional[Callable[[Exception], Any]] = None,
                 *passed: Any) -> None:
        self.app, self.end, self.passed = app, end, passed

    def run(self, work: Callable[..., Any], *given: Any) -> None:
        """Do it: what `with` does, in half the time."""
        try:
            work(*given)
        except Exception as fault:
            if not self.__exit__(type(fault), fault, fault.__traceback__):
                raise

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, fault: Any, trace: Any) -> bool:
        if not isinstance(fault, Exception) or isinstance(fault, self.passed):
            return False
        from traceback import format_exception      # rarely wanted, so not at start
        self.app.log.error("internal error: %s", redact("".join(
            format_exception(kind, fault, trace)).rstrip()))
        if self.end is not None:
            self.end(fault)
        return True


def internal_error(fault: Exception) -> ProxyError:
    return ProxyError("internal", "Internal error of the proxy (%s); its log says more."
                      % type(fault).__name__)


def raise_internal(fault: Exception) -> None:
    raise internal_error(fault) from None


async def keep_running(app: App, work: Callable[[App], Awaitable[None]]) -> None:
    """Run a periodic task, and again after a fault of ours: soon at first, then ever later."""
    least, most = app.limits.restart
    pause, clock = least, asyncio.get_running_loop().time
    while True:
        began = clock()
        with guarded(app):
            return await work(app)
        pause = pause if clock() - began < most else least
        await asyncio.sleep(pause)
        pause = min(2 * pause, most)


class Wire(asyncio.BufferedProtocol):
    """A connection.  Its owner closes it; losing it wakes whoever waits and calls `on_end`."""

    __slots__ = ("app", "transport", "buffer", "ended", "on_data", "on_end", "on_block", "guard",
                 "waiter", "deadline", "blocked_since", "closed_at", "flood_bytes", "held",
                 "on_open", "idle_since", "is_client", "fresh")

    def __init__(self, app: App, on_open: Optional[Callable[["Wire"], Any]] = None) -> None:
        self.app, self.on_open = app, on_open
        self.is_client = False                      # a caller's, not the demo upstream's own
        self.fresh = True                           # no request has come on it yet
        self.transport: Any = None
        self.buffer = bytearray()                   # what came and was not taken
        self.ended = False                          # nothing more will come
        self.on_data: Optional[Callable[[bytes], None]] = None
        self.on_end: Optional[Callable[[], None]] = None
        self.on_block: Optional[Callable[[bool], None]] = None   # our writes are (not) stuck
        self.guard: Optional[guarded] = None        # of these three; None: a fault ends the wire
        self.waiter: Optional["asyncio.Future[None]"] = None
        self.deadline = 0.0                         # of the waiter, in loop time; 0: none
        self.blocked_since = self.closed_at = self.idle_since = 0.0
        self.flood_bytes = 0                        # more unread than this: hang up; 0: never
        self.held = False                           # reading is paused

    # What asyncio calls.

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.app.wires.add(self)
        self.call(self.on_open, self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.app.receive

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(self.app.receive[:nbytes])
        if self.on_data is not None:
            (self.guard or guarded(self.app, self.abort)).run(self.on_data, data)
            return
        self.buffer += data
        if self.flood_bytes and len(self.buffer) > self.flood_bytes:
            self.abort()
        elif len(self.buffer) > BUFFER_BYTES:
            self.hold()
        self.wake()

    def eof_received(self) -> bool:
        """A FIN is a goodbye, from a client too: nobody waits for an answer any more."""
        self.end()
        return False

    def connection_lost(self, exc: Optional[Exception]) -> None:
        self.app.wires.discard(self)
        self.blocked_since = 0.0
        self.end()

    def pause_writing(self) -> None:
        self.blocked_since = time.monotonic()
        self.call(self.on_block, True)

    def resume_writing(self) -> None:
        self.blocked_since = 0.0
        self.call(self.on_block, False)
        self.wake()

    # What we call.

    def call(self, callback: Optional[Callable[..., Any]], *given: Any) -> None:
        """Tell the owner, where it wants to be told."""
        if callback is not None:
            (self.guard or guarded(self.app, self.abort)).run(callback, *given)

    def end(self) -> None:
        """Remember that nothing more comes, and tell whoever waits for it, once."""
        if self.ended:
            return
        self.ended = True
        self.wake()
        self.call(self.on_end)

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def wait(self, deadline: float) -> None:
        """Wait to be woken.  Raises asyncio.TimeoutError after the deadline (loop time)."""
        self.waiter = asyncio.Future()
        self.deadline = deadline
        try:
            await self.waiter
        finally:
            self.waiter, self.deadline = None, 0.0

    async def fill(self, deadline: float) -> bool:
        """Wait for more bytes in `buffer`; False when the connection ended instead."""
        self.release()
        size = len(self.buffer)
        while len(self.buffer) == size and not self.ended:
            await self.wait(deadline)
        return len(self.buffer) > size

    def is_quiet(self) -> bool:
        """Whether an idle connection is as it should be: open, and nothing came unasked."""
        return not (self.ended or self.closed_at or self.buffer)

    def peer_address(self) -> str:
        """The other side's address, "" when it is gone."""
        known = self.transport.get_extra_info("peername")
        return str(known[0]) if known else ""

    def local_port(self) -> int:
        """The port on which this connection was accepted, 0 when it is gone."""
        known = self.transport.get_extra_info("sockname")
        return int(known[1]) if known else 0

    def take(self) -> bytes:
        data, self.buffer = bytes(self.buffer), bytearray()
        return data

    def hold(self) -> None:
        """Stop reading: what the other side sends on waits in its own machine."""
        if not self.ended:
            self.held = True
            self.transport.pause_reading()

    def release(self) -> None:
        if self.held and not self.ended:
            self.held = False
            self.transport.resume_reading()

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    async def drain(self) -> None:
        """Wait until what was written has mostly gone; the sweep ends it when nobody reads."""
        while self.blocked_since and not self.ended:
            await self.wait(0.0)
        if self.ended:
            raise ConnectionResetError("the other side is gone")

    def close(self) -> None:
        """Send what was written, then close; the sweep aborts what takes too long."""
        self.on_data = self.on_end = self.on_block = self.guard = None
        if self.transport is not None and not self.closed_at:
            self.closed_at = time.monotonic()
            self.transport.close()

    def abort(self, fault: Optional[Exception] = None) -> None:
        if self.transport is not None:
            self.transport.abort()

    def expire(self, now: float) -> None:
        """Act on what is overdue: a wait, a stuck write, a slow close."""
        if self.waiter is not None and 0.0 < self.deadline < now and not self.waiter.done():
            self.waiter.set_exception(asyncio.TimeoutError())
        stalled = self.app.limits.write_stalled
        if (self.blocked_since and now - self.blocked_since > stalled) or \
                (self.closed_at and now - self.closed_at > stalled):
            self.abort()


# === BACKENDS ===============================================================
# The places that can answer, each with its address, its idle connections and
# what is known of its models.  `App.home` is Command Code.


class Pool:
    """Idle connections to one backend, newest last."""

    def __init__(self) -> None:
        self.idle: List[Wire] = []

    def take(self) -> Optional[Wire]:
        """A connection that still seems alive, None when there is none."""
        while self.idle:
            wire = self.idle.pop()
            if wire.is_quiet():
                return wire
            wire.abort()
        return None

    def prune(self, before: float) -> None:
        """Close what has been idle since before that moment, or has died meanwhile."""
        idle, self.idle = self.idle, []
        for wire in idle:
            if wire.idle_since >= before and wire.is_quiet():
                self.idle.append(wire)
            else:
                wire.close()


NO_MODELS = Models({}, {}, [])


@dataclass(eq=False)
class Backend:
    """A place that can answer: where it is, the way there, and what is known of its models."""

    name: str
    origin: Origin
    models: Models                              # the newest list that is known
    vendor: Optional[Vendor] = None             # None: Command Code
    key: Optional[RingKey] = None               # the vendor's
    pool: Pool = field(default_factory=Pool)
    proxy: Optional[Origin] = None              # HTTP proxy on the way
    proxy_authorization: str = ""
    proxy_known: bool = False
    calibrations: Dict[str, Calibration] = field(default_factory=dict)
    models_due: float = 0.0                     # loop time at which the list is asked for again
    models_task: Optional["asyncio.Task[Any]"] = None


def vendor_backends(vendors: Iterable[Vendor]) -> Dict[str, Backend]:
    return {vendor.name: Backend(
        vendor.name, parse_origin(vendor.base), NO_MODELS, vendor,
        new_ring_key(vendor.key, name=vendor.name) if vendor.key else None) for vendor in vendors}


def new_app(config: Config, limits: Limits, log: logging.Logger) -> App:
    """A proxy that does not listen yet."""
    version = DEFAULT_CLI_VERSION if config.cli_version == "auto" else config.cli_version
    home = Backend("commandcode", parse_origin(config.api_base), builtin_models())
    app = App(config, limits, log, home, memoryview(bytearray(READ_BYTES)),
              max_clients=config.max_connections, cli_version=version)
    app.raiser = guarded(app, raise_internal, ProxyError, ConnectionError)
    return app


# === PART: CALLS ============================================================
# === UPSTREAM CALLS =========================================================
# One call is one POST to the upstream over HTTP/1.1: from the pool of idle
# connections or fresh, through a proxy where the environment names one, with
# TLS always verified and redirects never followed.  A pooled connection that
# turns out dead before one byte of an answer came is replaced silently; every
# other repetition is RETRIES' decision.


@dataclass(**SLOTS)
class UpstreamCall:
    """An upstream that has answered with a head; `body` takes the framing off what follows."""

    wire: Wire
    head: ResponseHead
    body: Body
    pool: Pool                  # where its connection goes when it is over


@dataclass(**SLOTS)
class CallSpec:
    """What a call sends, the same on every attempt; emptied once it can never be sent again."""

    backend: Backend
    head: bytes
    payload: bytes
    upstream: UpstreamFormat


def parse_proxy(url: str) -> Tuple[Origin, str]:
    """(proxy, its Proxy-Authorization) of a proxy URL.  Raises ProxyError for one of another kind:
    to go around it would surprise whoever set it."""
    parts = urlsplit(url if "://" in url else "http://" + url)
    try:
        proxy = Origin(parts.scheme, parts.hostname or "", parts.port or 80, "")
    except ValueError:
        proxy = Origin("", "", 0, "")
    if proxy.scheme != "http" or not proxy.host:
        raise ProxyError("upstream_final", "Only http://host:port proxies can be used on the way "
                         "to the upstream (see HTTPS_PROXY, HTTP_PROXY, NO_PROXY).")
    userinfo = "%s:%s" % (unquote(parts.username or ""), unquote(parts.password or ""))
    basic = "Basic " + base64.b64encode(userinfo.encode()).decode() if parts.username else ""
    return proxy, basic


def read_proxy(backend: Backend) -> None:
    """Find the proxy for a backend once, by urllib's own rules.  Raises ProxyError."""
    named = any(name.lower().endswith("_proxy") for name in os.environ)
    if named or sys.platform.startswith(("win", "darwin")):     # else a slow import for nothing
        import urllib.request
        url = urllib.request.getproxies().get(backend.origin.scheme)
        where = "%s:%d" % (backend.origin.host, backend.origin.port)
        near = backend.vendor and LOOPBACK.fullmatch(backend.origin.host)
        if url and not near and not urllib.request.proxy_bypass(where):
            backend.proxy, backend.proxy_authorization = parse_proxy(url)
    backend.proxy_known = True


def tls_context(app: App) -> ssl.SSLContext:
    """The TLS settings: the platform's trust, or that of SSL_CERT_FILE; made at first use."""
    if app.tls is None:
        app.tls = ssl.create_default_context()
        app.tls.set_alpn_protocols(["http/1.1"])
    return app.tls


LOOK_FOR_CAUSE = " On the proxy's machine, `ccproxy.py doctor` looks for the cause."


def connect_error(app: App, origin: Origin, error: Exception) -> ProxyError:
    """What went wrong on the way to the upstream, in words that help."""
    where = "%s:%d" % (origin.host, origin.port)
    if isinstance(error, asyncio.TimeoutError):
        return ProxyError("unconnected", "No connection to the upstream %s within %s.%s" % (
            where, counted(app.config.upstream_connect_seconds, "second"), LOOK_FOR_CAUSE))
    if isinstance(error, ssl.SSLCertVerificationError):
        return ProxyError("upstream_final", "The certificate of the upstream %s could not be "
                          "verified: %s (SSL_CERT_FILE names a file of further authorities)."
                          % (where, error.verify_message))
    return ProxyError("unreachable", "No connection to the upstream %s: %s.%s" % (
        where, printable(str(error) or type(error).__name__, 200), LOOK_FOR_CAUSE))


async def open_wire(app: App, backend: Backend) -> Wire:
    """A fresh connection to a backend.  Raises ProxyError."""
    wire = Wire(app)
    app.metrics.counts["upstream_connections_total", "opened"] += 1
    try:
        await within(app, app.config.upstream_connect_seconds, connect_wire(app, backend, wire))
    except (OSError, asyncio.TimeoutError) as error:
        wire.abort()
        raise connect_error(app, backend.origin, error) from None
    except BaseException:       # cancelled: the client left
        wire.abort()
        raise
    return wire


async def connect_wire(app: App, backend: Backend, wire: Wire) -> None:
    """Connect, through the proxy where there is one, and start TLS where it is wanted."""
    loop = asyncio.get_running_loop()
    origin, first = backend.origin, backend.proxy or backend.origin
    if app.bare:
        Channel(await connect_socket(first.host, first.port), wire)
    else:
        await loop.create_connection(lambda: wire, first.host, first.port)
    if origin.scheme != "https":
        return
    if backend.proxy is not None:
        await open_tunnel(backend, wire)
    if app.bare:
        await wire.transport.start_tls(tls_context(app), origin.host)
    else:
        wire.transport = await loop.start_tls(wire.transport, wire, tls_context(app),
                                              server_hostname=origin.host)


async def open_tunnel(backend: Backend, wire: Wire) -> None:
    """CONNECT through the proxy (RFC 9110 9.3.6)."""
    target = "%s:%d" % (bracketed(backend.origin.host), backend.origin.port)
    fields = [("host", target)]
    if backend.proxy_authorization:
        fields.append(("proxy-authorization", backend.proxy_authorization))
    wire.write(head_bytes("CONNECT %s HTTP/1.1" % target, fields))
    head = await read_response_head(wire, float("inf"))
    if head.status != 200 or wire.buffer:
        raise OSError("the proxy answered %d to CONNECT" % head.status)


async def read_response_head(wire: Wire, deadline: float) -> ResponseHead:
    """The next answer's head; 1xx are skipped.  Raises ProxyError, asyncio.TimeoutError, and
    ConnectionResetError where not one byte came."""
    seen = interim = 0
    while interim <= MAX_INTERIM_HEADS:
        end = find_head_end(wire.buffer, seen, upstream_fault) if wire.buffer else -1
        if end < 0:
            seen = len(wire.buffer)
            if not await wire.fill(deadline):
                if wire.buffer or interim:
                    raise upstream_fault("the connection ended inside a head")
                raise ConnectionResetError("closed without an answer")
            continue
        head = parse_response_head(bytes(wire.buffer[:end]))
        del wire.buffer[:end]
        if head.status >= 200:
            return head
        if head.status == 101:
            break
        seen, interim = 0, interim + 1
    raise upstream_fault("interim answers without end")


def upstream_of(app: App, backend: Backend, fields: Fields, model: str) -> UpstreamFormat:
    """The format in which a model is asked for.  Raises ProxyError 400 for an unknown word."""
    word = parse_upstream(fields.get("x-ccproxy-upstream", ""), app.config.upstream)
    if backend.vendor:
        return backend.vendor.api
    if app.demo or word == "alpha":
        return ALPHA
    found = find_model(model, app.home.models)
    return UPSTREAMS[word](model, found.endpoints if found else ())


def configured_upstream(config: Config) -> str:
    return config.api_base + (ALPHA.path if config.upstream == "alpha" else "/provider/v1")


def upstream_address(app: App) -> str:
    """Which upstream is in use, for the start-up screen and /health."""
    return "demo" if app.demo else configured_upstream(app.config)


def call_head(backend: Backend, method: str, path: str, credential: Tuple[str, str],
              fields: List[Tuple[str, str]]) -> bytes:
    """The head of a call with a key, through a proxy where there is one."""
    if not backend.proxy_known:
        read_proxy(backend)
    path = backend.origin.base + path
    every = [("host", backend.origin.authority), credential, *fields]
    if backend.proxy is not None and backend.origin.scheme == "http":
        path = "http://%s%s" % (backend.origin.authority, path)
        if backend.proxy_authorization:
            every.append(("proxy-authorization", backend.proxy_authorization))
    return head_bytes("%s %s HTTP/1.1" % (method, path), every)


def credential_of(key: str, name: str = "authorization") -> Tuple[str, str]:
    """The header that holds a key."""
    return name, "Bearer " + key if name == "authorization" else key


def build_call(app: App, backend: Backend, upstream: UpstreamFormat, key: str, prompt: Prompt,
               traceparent: str) -> CallSpec:
    """The request of one call: exactly these headers, nothing of the client's but its key, its
    traceparent and what the session is derived from."""
    payload = upstream.build(prompt, prompt.session)
    own = upstream.fields(app.config, app.cli_version, prompt.session)
    credential = credential_of(key, upstream.key_field)
    return CallSpec(backend, call_head(backend, "POST", upstream.path, credential, [
        ("content-type", "application/json"), ("accept", "*/*"), ("accept-encoding", "identity"),
        ("user-agent", "ccproxy/" + __version__), *own, ("traceparent", traceparent),
        ("content-length", str(len(payload)))]), payload, upstream)


async def send_call(app: App, wire: Wire, spec: CallSpec) -> UpstreamCall:
    """Send the request and read the answer's head.  Raises as read_response_head does."""
    if len(spec.payload) <= READ_BYTES:
        wire.write(spec.head + spec.payload)    # one packet, one system call
    else:
        wire.write(spec.head)
        wire.write(spec.payload)                # too large to be copied
    seconds = app.config.upstream_idle_seconds
    try:
        head = await read_response_head(wire, time.monotonic() + seconds)
    except asyncio.TimeoutError:
        raise ProxyError("late", "The upstream did not answer within %s "
                         "(upstreamIdleSeconds)." % counted(seconds, "second")) from None
    coding = head.fields.get("content-encoding", "").strip(" \t").lower()
    if head.status != 200 and coding not in CODINGS:
        coding = ""         # its status counts; read_upstream_failure ignores its body
    return UpstreamCall(wire, head, open_body(head.framing, coding, upstream_fault),
                        spec.backend.pool)


async def open_call(app: App, spec: CallSpec) -> UpstreamCall:
    """A call whose head came with status 200.  Raises ProxyError for every other outcome."""
    call = None
    while call is None:
        wire = spec.backend.pool.take()
        pooled = wire is not None
        if pooled:
            app.metrics.counts["upstream_connections_total", "reused"] += 1
        wire = wire or await open_wire(app, spec.backend)
        try:
            call = await send_call(app, wire, spec)
        except ConnectionResetError:
            wire.abort()
            if not pooled:
                raise ProxyError("upstream", "The upstream closed the connection without an "
                                 "answer.") from None
        except BaseException:       # also when the client left: nothing is half used
            wire.abort()
            raise
    if call.head.status == 200:
        return call
    body = await read_short_body(app, call)
    raise spec.upstream.read_failure(call.head.status, call.head.fields, body)


async def read_short_body(app: App, call: UpstreamCall) -> bytes:
    """The end of a call: its answer, as far as it comes in time and is not too long."""
    deadline = time.monotonic() + app.limits.error_body
    body = b""
    try:
        while not (call.body.done or call.body.broken) and len(body) < MAX_ERROR_BODY_BYTES:
            if not call.wire.buffer and not await call.wire.fill(deadline):
                break
            body += call.body.feed(call.wire.take())
    except (asyncio.TimeoutError, ProxyError):
        app.log.debug("the body of an upstream error was cut off")
    finally:
        give_back(app, call)
    return body[:MAX_ERROR_BODY_BYTES]


def give_back(app: App, call: UpstreamCall) -> None:
    """Keep a call's connection if its answer is complete and there is room, else hang up."""
    wire, idle = call.wire, call.pool.idle
    complete = call.body.done and not call.body.rest and call.head.keep_alive
    if complete and wire.is_quiet() and len(idle) < app.limits.pool_size:
        wire.release()
        wire.idle_since = time.monotonic()
        idle.append(wire)
    else:
        wire.abort()


# Side calls: the model list, and the version of the vendor's client.


def ask_url(url: str, context: Optional[ssl.SSLContext], seconds: float, fields: Fields,
            body: Optional[bytes] = None, direct: bool = False) -> Tuple[int, Fields, bytes]:
    """GET, or POST of a body, without following redirects (blocks): status, headers by lower-case
    name, body.  By urllib's handlers for proxies (`direct`: none) and TLS alone.  Raises OSError,
    of urllib's URLError where no connection came about."""
    import http.client
    import urllib.request
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler({} if direct else None),
                    urllib.request.HTTPHandler(),
                    urllib.request.HTTPSHandler(context=context)):
        opener.add_handler(handler)
    request = urllib.request.Request(url, body, {
        "user-agent": "ccproxy/" + __version__, "accept-encoding": "identity", **fields})
    try:
        with opener.open(request, timeout=seconds) as answer:
            told = {name.lower(): value for name, value in answer.headers.items()}
            return answer.status, told, answer.read(8 * MIB)
    except http.client.HTTPException as error:
        raise OSError("malformed HTTP: %s" % type(error).__name__) from None


def fetch_models(origin: Origin, context: Optional[ssl.SSLContext], seconds: float) -> Any:
    """The upstream's list of models; it wants no key (blocks).  Raises OSError, ValueError."""
    status, _, body = ask_url("%s://%s%s/provider/v1/models" % (
        origin.scheme, origin.authority, origin.base), context, seconds, {})
    if status != 200:
        raise OSError("status %d" % status)
    return json.loads(body)


async def refresh_models(app: App) -> None:
    """Ask the upstream for its list of models; on failure the known one stays for a minute."""
    app.home.models_due = time.monotonic() + app.config.model_refresh_interval_ms / 1000
    origin = app.home.origin
    try:
        context = tls_context(app) if origin.scheme == "https" else None
        models = await in_thread(lambda: merge_live_models(
            fetch_models(origin, context, app.limits.side_call), builtin_models()))
        if models is None:
            raise ValueError("no list of models")
        if not app.config.use_provider_models:
            return              # switched off during the call
        app.home.models = models
        app.log.debug("model list: %d models", len(models.listed))
    except (OSError, ValueError, RecursionError) as error:
        app.home.models_due = time.monotonic() + min(
            60.0, app.config.model_refresh_interval_ms / 1000)
        app.log.debug("model list not refreshed: %s", printable(str(error), 200))


def keep_models_fresh(app: App) -> Optional["asyncio.Task[Any]"]:
    """Start a refresh when the list is too old; the running one, None when nothing is to do."""
    if app.home.models_task is None or app.home.models_task.done():
        if not app.config.use_provider_models or time.monotonic() < app.home.models_due:
            return None
        app.home.models_task = spawn(app, refresh_models(app))
    return app.home.models_task


async def ask_npm(app: App) -> Optional[str]:
    """The newest version of the vendor's client as an installed npm tells it, or None."""
    import shutil
    npm = shutil.which("npm")
    if npm is None:
        return None
    process = await asyncio.create_subprocess_exec(
        npm, "view", "command-code", "version", stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
    try:
        output, _ = await within(app, app.limits.npm, process.communicate())
    except asyncio.TimeoutError:
        return None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    version = output.decode("ascii", "replace").strip()
    return version if VERSION_PATTERN.fullmatch(version) else None


async def keep_version_fresh(app: App) -> None:
    """cliVersion auto: ask npm now and once a day; what cannot be had leaves things as they are."""
    while True:
        try:
            version = await ask_npm(app)
        except OSError as error:
            app.log.debug("npm: %s", printable(str(error), 200))
            version = None
        if version:
            app.cli_version = version
        app.log.info("cliVersion auto: %s%s", app.cli_version,
                     "" if version else " (npm could not tell)")
        await asyncio.sleep(24 * 3600)


# === ACCOUNTS ===============================================================
# Asking the upstream what accounts have left: in the background, by one task a
# key and few in all.  A request waits for them a moment at most, and only where
# nothing is known yet.  What goes wrong with these side calls never keeps a key
# from being chosen; that the upstream refused the key itself is shown.

MAX_REFRESHES = 16          # accounts asked at once; the rest wait for their next request


class Ring(NamedTuple):
    """What RETRIES needs to go from key to key: `build` makes the call of the key that serves,
    with the session id that is that key's own."""

    keys: Tuple[RingKey, ...]
    conversation: str
    routing: Routing
    build: Callable[[RingKey], CallSpec]
    operator: bool = False          # the keys are the operator's


def read_routing(config: Config, fields: Fields, model: str, upstream: str) -> Routing:
    """How a request's key is chosen: the options, and the header.  Raises ProxyError 400."""
    policy = parse_policy(fields.get("x-ccproxy-routing", ""), config.routing_policy)
    return Routing(model, upstream, policy, config.fallback_policy, config.max_in_flight_per_key,
                   config.key_cooldown_seconds, config.account_refresh_seconds)


async def ask_account(app: App, key: RingKey, path: str) -> Any:
    """One account answer.  Raises ProxyError, ValueError."""
    head = call_head(app.home, "GET", path, credential_of(key.key), [
        ("accept", "application/json"), ("accept-encoding", "identity"),
        ("user-agent", "ccproxy/" + __version__), ("x-command-code-version", app.cli_version),
        ("x-cli-environment", "production")])
    call = await open_call(app, CallSpec(app.home, head, b"", ALPHA))
    return json.loads(await read_short_body(app, call))


def log_refusal(app: App, key: RingKey, before: AccountState, now: float) -> None:
    """Log that a key's account, which was as `before`, is refused now."""
    known = account_state(key, state_of(app.keys, key, now), Routing(), now)
    if known.word == "refused" != before.word:
        lent = any(key.digest == one.digest for one in app.operator.keys)
        app.log.log(logging.WARNING if lent else logging.INFO, "%s was refused by the upstream "
                    "(401)", key_words(key))


async def read_account(app: App, key: RingKey, state: KeyState) -> Optional[Figures]:
    """An account's figures, by its organisation where the key is of one; whether the upstream
    accepts the key is noted.  Raises ProxyError, ValueError."""
    whoami, credits, subscriptions = ACCOUNT_PATHS
    before = account_state(key, state, Routing(), time.time())
    try:
        org = read_org(await ask_account(app, key, whoami))
    except ProxyError as error:
        note_key_check(state, error.status, time.time())
        log_refusal(app, key, before, time.time())
        raise
    note_key_check(state, 200, time.time())
    query = "?orgId=" + org if org else ""
    billing = await ask_account(app, key, credits + query)
    subscription = await ask_account(app, key, subscriptions + query)
    return read_figures(*conceal([billing, subscription], [key.key]), time.time())


async def refresh_account(app: App, key: RingKey) -> None:
    """Ask for figures once; what cannot be had leaves those that are known."""
    state = state_of(app.keys, key, time.time())
    state.asked, state.unreached = time.time(), False
    try:
        figures = await within(app, app.config.account_timeout_seconds,
                               read_account(app, key, state))
        if figures is not None:
            note_figures(state, figures)
    except (ProxyError, OSError, ValueError, RecursionError, asyncio.TimeoutError) as error:
        if isinstance(error, ProxyError) and error.kind in ("unreachable", "unconnected"):
            state.asked, state.unreached = 0.0, True        # asked again at the next chance
        app.log.debug("no account figures for %s: %s", key.shown, printable(hide(
            str(error), [key.key]), 200))


def start_refresh(app: App, key: RingKey, seconds: float) -> Optional["asyncio.Task[Any]"]:
    """The task that asks for a key's figures, where they are older than that and it may run."""
    running = app.refreshes.get(key.digest)
    due = time.time() - state_of(app.keys, key, time.time()).asked >= seconds
    if running is not None or not due or len(app.refreshes) >= MAX_REFRESHES:
        return running
    task = app.refreshes[key.digest] = spawn(app, refresh_account(app, key))
    task.add_done_callback(lambda _: app.refreshes.pop(key.digest, None))
    return task


async def await_figures(app: App, keys: Iterable[RingKey], seconds: float, wait: float) -> None:
    """Start what refreshes are due, and wait so long for accounts of which nothing is known."""
    waited = []
    for key in keys:
        task = start_refresh(app, key, seconds)
        if task is not None and state_of(app.keys, key, time.time()).figures is None:
            waited.append(task)
    if waited:
        await asyncio.wait(waited, timeout=wait)


async def await_all_figures(app: App, keys: Tuple[RingKey, ...], seconds: float) -> None:
    """Ask for all figures that are older than that, a few at a time, within the time for one."""
    deadline = time.monotonic() + app.config.account_timeout_seconds
    for at in range(0, len(keys), MAX_REFRESHES):
        started = [start_refresh(app, key, seconds) for key in keys[at:at + MAX_REFRESHES]]
        waited = [task for task in started if task is not None]
        if waited:
            await asyncio.wait(waited, timeout=max(0.0, deadline - time.monotonic()))


# === ALERT WATCH ============================================================
# Looking at the operator's accounts and at the error rate from time to time, and
# telling what ALERTS finds: in the log, on the page (`App.alerts`), and to a
# webhook, by a task of its own, in order, tried again a few times.  What stands is
# in memory: after a restart it is told again.

MAX_POSTS = 1024            # that wait for the webhook; the oldest go first
AGAIN_STATUSES = (408, 425, 429)        # besides 5xx: what a webhook may mend by itself


@dataclass(eq=False)
class AlertWatch:
    """What the watch remembers between two looks."""

    asked: float = 0.0                  # epoch second at which accounts were asked last,
    requests: int = 0                   # and how many requests their keys had then
    standing: Dict[str, Standing] = field(default_factory=dict)
    posts: Deque[Json] = field(default_factory=lambda: deque(maxlen=MAX_POSTS))
    posting: Optional["asyncio.Task[Any]"] = None


async def watch_alerts(app: App) -> None:
    """Look at what is known every few seconds, and ask the accounts whenever they are due."""
    watch = AlertWatch()
    while True:
        await asyncio.sleep(app.limits.alert_tick)
        keys = () if app.demo else app.operator.keys
        if are_accounts_due(app, watch, keys):
            await await_all_figures(app, keys, app.config.alert_interval_seconds / 2)
        if watch.standing or alert_limits(app.config):
            tell_alerts(app, watch, keys)


def are_accounts_due(app: App, watch: AlertWatch, keys: Tuple[RingKey, ...]) -> bool:
    """Whether accounts must be asked now: from time to time, where an option watches their balance,
    a webhook waits for alerts, their keys were used since, or an alert stands."""
    now, limits = time.time(), set(alert_limits(app.config)) - {"errorRateAlert"}
    if not keys or not limits or 0 <= now - watch.asked < app.config.alert_interval_seconds:
        return False
    requests = sum(state_of(app.keys, key, now).requests for key in keys)
    standing = {one.alert.kind for one in watch.standing.values()}
    if requests == watch.requests and not app.config.alert_webhook_url and \
            not (standing | set(BALANCE_KINDS)) & limits:
        return False
    watch.asked, watch.requests = now, requests
    return True


def list_watched(app: App, keys: Tuple[RingKey, ...], least: float, now: float) -> List[Watched]:
    """All that is watched: these keys' accounts, and the error rate of `least` requests or more."""
    routing = Routing(refresh=app.config.account_refresh_seconds)
    watched, accounts = [], []
    lent = [backend.key for backend in app.vendors.values() if backend.key]
    for key in (*keys, *lent):
        state = state_of(app.keys, key, now)
        accounts.append(account_state(key, state, routing, now))
        watched += watch_account(key, accounts[-1], state.figures, now)
    rate = error_percentage(app.recent, now - app.config.error_rate_alert_seconds, least)
    return [*watched, *watch_pool(accounts[:len(keys)]), ("errorRateAlert", rate, None)]


def tell_alerts(app: App, watch: AlertWatch, keys: Tuple[RingKey, ...]) -> None:
    """Judge what is known of these keys and of the last requests, and tell what is new."""
    now, config = time.time(), app.config
    stands = any(one.alert.kind == "errorRateAlert" for one in watch.standing.values())
    watched = list_watched(app, keys, 1 if stands else config.error_rate_alert_requests, now)
    before = watch.standing
    watch.standing, news = judge_alerts(before, watched, alert_limits(config), (
        config.alert_repeat_seconds, config.alert_interval_seconds), now)
    if before or watch.standing:
        app.alerts = [alert_entry(one.alert) for one in watch.standing.values()]
    for one in news:
        app.log.log(logging.WARNING if one.event == "alert" else logging.INFO, "%s: %s",
                    one.event, one.text)
    if app.config.alert_webhook_url:
        watch.posts.extend(webhook_body(one, now) for one in news)
        if watch.posts and (watch.posting is None or watch.posting.done()):
            watch.posting = spawn(app, send_posts(app, watch.posts))


async def send_posts(app: App, posts: Deque[Json]) -> None:
    """Post all that waits, in order.  What a webhook does not take after some attempts is lost,
    and so is what waits behind it: they would only fail one after the other."""
    while posts:
        body = to_json(posts.popleft())
        try:
            fault = await try_post(app, body)
        except ProxyError:      # the proxy stops, and waits for nobody
            return
        if fault:
            app.log.warning("alerts not delivered to %s: %s; lost: %d", urlsplit(
                app.config.alert_webhook_url).hostname, fault, len(posts) + 1)
            posts.clear()


async def try_post(app: App, body: bytes) -> str:
    """Post once and, while that may help, again; "" when it was taken (or is not wanted any
    more), else why not.  Raises ProxyError `busy`."""
    fault = ""
    for pause in (0.0, *app.limits.webhook_backoff):
        await asyncio.sleep(pause)
        url, token = app.config.alert_webhook_url, app.config.alert_webhook_token
        if not url:
            return ""
        fields = {"content-type": "application/json"}
        if token:
            fields["authorization"] = "Bearer " + token
        try:
            context = tls_context(app) if url.lower().startswith("https:") else None
            status, _, _ = await within(app, app.limits.webhook, in_thread(
                lambda: ask_url(url, context, app.limits.webhook, fields, body)))
        except (OSError, ValueError, asyncio.TimeoutError) as error:
            fault = printable(hide(str(error), held_secrets(app)), 200) or "no answer in time"
        else:
            if 200 <= status < 300:
                return ""
            fault = "status %d" % status
            if status < 500 and status not in AGAIN_STATUSES:
                break
    return fault


# === PART: ANSWERING ========================================================
# === RELAY ==================================================================
# Joins one client with, one after another, the upstream calls that are made
# for its answer.  While a call runs, `receive` is called with each piece that
# the upstream sends: unframe, read, write once.  A client that does not read
# pauses the upstream; `tick`, called by the sweep, keeps a silent stream alive
# with comments and gives up an upstream that stays silent too long.
#
# The response head goes out with the first frame, so that whatever fails
# before it is answered with a real status; a stream that stays silent gets its
# head with the first comment.


class Relay:
    """One answer on its way to one client."""

    __slots__ = ("app", "client", "answer", "spec", "head", "framed", "call", "opened", "sent",
                 "heard", "lines", "done", "over", "first", "clock", "key", "fault")

    def __init__(self, app: App, client: Wire, answer: Answer, spec: CallSpec,
                 head: Callable[[], bytes]) -> None:
        self.app, self.client, self.answer, self.spec = app, client, answer, spec
        self.head = head                # makes the response head, when it is wanted
        self.framed = True              # chunked; else (HTTP/1.0) the end is the connection's
        self.call: Any = None           # UpstreamCall: the one that runs
        self.opened = False             # the response head went out
        self.clock = time.monotonic
        self.sent = self.heard = self.clock()
        self.first = 0.0                # loop time of the first frame, or of a plain answer's line
        self.lines = 0
        self.key: Any = None            # RingKey: whose call the last one was
        self.done: Any = None           # future: this call's answer is over
        self.over: Any = None           # future: nothing more comes from this call
        self.fault: Optional[ProxyError] = None     # of ours, that ended the answer
        client.on_block, client.guard = self.block, guarded(app, self.crash)
        app.relays.add(self)

    def attach(self, call: UpstreamCall) -> None:
        """Let a call's answer flow, beginning with what already came behind its head."""
        self.done, self.over = asyncio.Future(), asyncio.Future()
        self.call, self.heard = call, self.clock()
        wire = call.wire
        wire.on_data, wire.on_end, wire.guard = self.receive, self.end, self.client.guard
        if self.client.blocked_since:
            wire.hold()
        if wire.buffer or call.body.done:
            wire.call(wire.on_data, wire.take())
        if wire.ended:
            wire.call(wire.on_end)

    def receive(self, data: bytes) -> None:
        """A piece of the upstream's body, still framed."""
        answer, call = self.answer, self.call
        try:
            frames = answer.feed(call.body.feed(data))
            if call.body.broken is not None:
                frames += answer.stop(call.body.broken)
            elif call.body.done and not answer.over:
                frames += answer.eof()
        except ProxyError as error:
            frames = answer.stop(error)
            call.wire.abort()
        if frames:
            self.send(frames)
            self.heard = self.sent
            if not self.first:
                self.first = self.sent
        elif answer.lines_read != self.lines:
            self.heard = self.clock()
            if not (self.first or answer.stream):
                self.first = self.heard
        self.lines = answer.lines_read
        if answer.visible:
            self.spec.payload = b""     # nothing can be repeated any more
        if answer.over:
            self.settle()

    def end(self) -> None:
        """The upstream's connection ended."""
        call, answer = self.call, self.answer
        try:
            if not call.body.done:
                call.body.eof()
            frames = b"" if answer.over else answer.eof()
        except ProxyError as error:
            frames = answer.stop(error)
        if frames:
            self.send(frames)
        self.settle()
        wake(self.over)

    def settle(self) -> None:
        """The answer of this call is over: wake who awaits it."""
        wake(self.done)
        if self.answer.error is not None or not self.answer.reading.over:
            self.call.wire.abort()      # failed, or cut by a stop sequence: it would run on
        if self.call.body.done:
            wake(self.over)

    def crash(self, fault: Exception) -> None:
        """A fault of ours ends this answer: whoever waits for it, or for a next call, is woken."""
        self.fault, call = internal_error(fault), self.call
        if call is None:
            self.client.call(self.client.on_end)    # as if the client had left: see run_job
            return
        call.wire.on_data = call.wire.on_end = None
        call.wire.abort()
        if not self.done.done():
            self.done.set_exception(self.fault)
        wake(self.over)

    def send(self, frames: bytes, last: bool = False) -> None:
        """Write frames, behind the response head where that has not gone out."""
        last = last or (self.answer.over and self.answer.error is None)
        data = chunk(frames) if frames and self.framed else frames
        if last and self.framed:
            data += LAST_CHUNK
        if not self.opened:
            self.opened = True
            data = self.head() + data
        self.client.write(data)
        self.sent = self.clock()

    def block(self, blocked: bool) -> None:
        """The client reads too slowly, or again: the upstream waits with it."""
        if self.call is None:
            return
        if blocked:
            self.call.wire.hold()
        else:
            self.heard = self.clock()
            self.call.wire.release()

    def tick(self, now: float) -> None:
        """Look at the clock: a comment for a silent stream, the end for a silent upstream."""
        if self.client.blocked_since or (self.done is not None and self.done.done()):
            return
        limits = self.app.limits
        if self.answer.stream and now - self.sent >= limits.silence - limits.sweep:
            quiet = max(now - self.heard, 0.0)
            self.send(comment_frame("waiting %ds" % round(quiet), self.answer.comment_end))
        idle = self.app.config.upstream_idle_seconds
        if self.call is not None and now - self.heard > idle:
            self.give_up(ProxyError("late", "The upstream was silent for %s "
                                    "(upstreamIdleSeconds)." % counted(idle, "second")))

    def give_up(self, error: ProxyError) -> None:
        """End a running call with this error."""
        if self.call is None or self.answer.over:
            return
        frames = self.answer.stop(error)
        if frames:
            self.send(frames)
        self.settle()

    def detach(self) -> None:
        """Let go of the call; a connection that is not in order is closed."""
        call, self.call, self.done = self.call, None, None
        if call is not None:
            call.wire.on_data = call.wire.on_end = call.wire.guard = None
            give_back(self.app, call)

    def close(self) -> None:
        self.detach()
        if self.client.on_block == self.block:      # else a next request's relay has it
            self.client.on_block = self.client.guard = None
        self.app.relays.discard(self)


async def finish_reading(relay: Relay) -> None:
    """Read on for a moment behind the answer's end: for its cost, and to keep the connection."""
    try:
        if relay.over is not None and not relay.over.done():
            await asyncio.wait([relay.over], timeout=relay.app.limits.after_end)
    finally:
        relay.close()


# === RETRIES ================================================================
# The attempts that are made for one answer.  What can be mended is tried again
# until text or a tool call was shown; the conversation's id stays the same.


async def run_call(relay: Relay, record: Dict[str, Any]) -> None:
    """One attempt, up to the end of its answer.  Raises ProxyError when it failed."""
    try:
        call = await open_call(relay.app, relay.spec)
        told = call.head.fields.get("x-trace-id")
        trace_id = printable(hide(told, relay.answer.secrets), 64) if told else None
        record["trace"] = trace_id
        relay.attach(call)
        await relay.done
    except ProxyError as error:
        error.trace_id = conceal(error.trace_id, relay.answer.secrets)
        record["trace"] = error.trace_id
        raise
    if relay.answer.error is not None:
        relay.answer.error.trace_id = relay.answer.error.trace_id or trace_id
        raise relay.answer.error


def may_repeat(relay: Relay, error: ProxyError) -> bool:
    """Only before text or a tool call was shown, and only what repeating can mend."""
    soon = (error.retry_after or 0.0) <= relay.app.limits.short_retry_after
    return error.retryable and soon and not relay.answer.visible and not relay.app.draining


async def run_key_call(relay: Relay, record: Dict[str, Any], key: RingKey,
                       routing: Routing) -> None:
    """One attempt with one key, counted.  Raises ProxyError when it failed."""
    app, began, shown, answered = relay.app, time.time(), relay.answer.shown, False
    state = state_of(app.keys, key, began)
    state.requests += 1
    state.in_flight += 1
    relay.key, record["key"] = key, key.shown
    try:
        await run_call(relay, record)
        answered = True
    except ProxyError as error:
        state.failures += 1
        if not app.ending.done():       # else it is we who ended it
            before = account_state(key, state, Routing(), began)
            note_failure(state, error, routing, time.time())
            log_refusal(app, key, before, time.time())
        raise
    finally:
        state.in_flight -= 1
        if answered or (relay.answer.shown and not shown):     # or cut, or the client left
            note_success(state, began, time.time())


def begin_anew(relay: Relay, error: ProxyError, mendable: bool, code: str, detail: str) -> None:
    """Make ready for the call after a failed one, with a note.  Raises the error if none may be."""
    relay.detach()
    if relay.app.ending.done():
        raise stopping_error() from None
    if not mendable:
        raise error
    relay.app.log.debug("%s: %s failed: %s", code, relay.key.shown, printable(hide(
        error.message, relay.answer.secrets), 200))
    if relay.answer.stream and relay.answer.shown:
        relay.app.metrics.counts["splices_total",] += 1
    relay.answer.restart()
    add_note(relay.answer.reply.notes, code, detail)


async def run_ring(relay: Relay, record: Dict[str, Any], ring: Ring) -> None:
    """Calls with one fit key after another until one succeeds, each key once.  Raises
    ProxyError: after visible output the failure as it is, else the most useful one."""
    app, routing = relay.app, ring.routing
    tried: List[str] = []
    seen: List[ProxyError] = []
    await await_figures(app, ring.keys, routing.refresh, app.limits.figures_wait)
    while True:
        now = time.time()
        key = choose_key(app.keys, ring.keys, ring.conversation, routing, now, tried)
        if key is None:
            raise spent_error(app.keys, ring.keys, routing, now, seen)
        tried.append(key.digest)
        relay.spec = ring.build(key)
        try:
            await run_key_call(relay, record, key, routing)
            return
        except ProxyError as error:
            mendable = is_replaceable(error) and not (relay.answer.visible or app.draining)
            begin_anew(relay, error, mendable, "failover", "%s %s" % (key.shown, error.kind))
            seen.append(error)
            record["retries"] = len(seen)


async def run_calls(relay: Relay, record: Dict[str, Any], key: RingKey,
                    routing: Routing) -> None:
    """Calls with one key until one succeeds or `Limits.backoff` ends.  Raises ProxyError."""
    app = relay.app
    pauses: Tuple[Optional[float], ...] = app.limits.backoff + (None,)
    for attempt, pause in enumerate(pauses):
        try:
            await run_key_call(relay, record, key, routing)
            return
        except ProxyError as error:
            mendable = pause is not None and may_repeat(relay, error)
            begin_anew(relay, error, mendable, "retried", error.kind)
            wait = max(pause or 0.0, error.retry_after or 0.0)
        record["retries"] = attempt + 1
        await asyncio.wait([app.ending], timeout=wait)
        if app.ending.done():
            raise stopping_error()


# === COMPRESSED BODIES ======================================================
# Request bodies in gzip, deflate or zstd.  The first two are Python's own on
# every version; zstd is Python's from 3.14 on, before that the system's libzstd
# is asked through ctypes, and where neither is there it is a 415 that says so.


def decode_body(data: bytes, coding: str, most: int) -> bytes:
    """A body without its compression, known by its header or, where that lies, by its magic."""
    if coding == "zstd" or data[:4] == b"\x28\xb5\x2f\xfd":
        return inflate_zstd(data, most)
    if coding in ("", "identity") and data[:2] == b"\x1f\x8b":
        coding = "gzip"
    return inflate(data, coding, most)


def inflate_zstd(data: bytes, most: int) -> bytes:
    """A zstd body decompressed: by Python (3.14) or by the system's libzstd, else 415."""
    try:
        from compression import zstd        # type: ignore[import-not-found]
    except ImportError:
        return inflate_libzstd(data, most)
    reader = zstd.ZstdDecompressor()
    try:
        content = reader.decompress(data, max_length=most + 1)
    except zstd.ZstdError:
        raise client_fault("the body is not the zstd it says to be") from None
    if len(content) > most:
        raise too_large(most)
    if not reader.eof or reader.unused_data:
        raise client_fault("the compressed body is cut off, or not one frame")
    return content


def load_libzstd() -> Any:
    """The system's libzstd.  Raises ProxyError `encoding` when there is none."""
    import ctypes
    for name in ("libzstd.so.1", "libzstd.1.dylib", "libzstd.dll", "zstd.dll"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.ZSTD_createDStream.restype = ctypes.c_void_p
        library.ZSTD_freeDStream.argtypes = [ctypes.c_void_p]
        library.ZSTD_decompressStream.restype = ctypes.c_size_t
        library.ZSTD_decompressStream.argtypes = [ctypes.c_void_p] * 3
        library.ZSTD_isError.argtypes = [ctypes.c_size_t]
        return library
    raise ProxyError("encoding", "Content-Encoding zstd needs Python 3.14 or libzstd on the "
                     "proxy's machine: send gzip or no compression.", param="content-encoding")


def inflate_libzstd(data: bytes, most: int) -> bytes:
    """The same through ctypes: its buffers are (address, size, position)."""
    import ctypes
    library = load_libzstd()
    room = ctypes.create_string_buffer(128 * KIB)
    source = ctypes.create_string_buffer(data, len(data))
    given = (ctypes.c_size_t * 3)(ctypes.addressof(source), len(data), 0)
    content, left = bytearray(), 1
    stream = library.ZSTD_createDStream()
    try:
        while left:         # 0: the frame is complete
            taken = (ctypes.c_size_t * 3)(ctypes.addressof(room), len(room), 0)
            left = library.ZSTD_decompressStream(stream, taken, given)
            content += room.raw[:taken[2]]
            if library.ZSTD_isError(left) or (left and given[2] == len(data) and not taken[2]):
                raise client_fault("the body is not the zstd it says to be, or is cut off")
            if len(content) > most:
                raise too_large(most)
    finally:
        library.ZSTD_freeDStream(stream)
    if given[2] < len(data):
        raise client_fault("the compressed body is not one frame")
    return bytes(content)


# === EXCHANGES ==============================================================
# One request and its answer on a client's connection: whole responses, CORS,
# and request bodies, read within every limit of time and size.  A body that
# nobody read is read behind the answer, or the connection is closed: it must
# never be taken for the next request.

JSON_TYPE = ("content-type", "application/json")
PRIVATE_FIELDS = [("cache-control", "no-store"), ("x-content-type-options", "nosniff"),
                  ("cross-origin-resource-policy", "same-origin")]


@dataclass(eq=False, **SLOTS)
class Exchange:
    """One request and what became of it; `record` is its line in the log."""

    wire: Wire
    head: RequestHead
    started: float                              # loop time
    keep: bool                                  # the connection may serve another request
    face: Optional[Face] = None                 # whose error shape is used
    dry_run: bool = False                       # explain the call instead of making it
    opened: bool = False                        # a response head went out
    body_begun: bool = False
    body_read: bool = False
    reserved: int = 0                           # bytes of App.bodies
    finishing: Optional["asyncio.Task[Any]"] = None     # reads on for the cost of a stream
    relay: Optional[Relay] = None               # of its answer, from when it is asked for
    number: int = 0                             # by which it is shown while it runs
    private: bool = False                       # its answer is for no page of another origin
    secrets: Optional[List[str]] = None         # see secrets_of
    record: Dict[str, Any] = field(default_factory=dict)


def secrets_of(app: App, exchange: Exchange) -> List[str]:
    """What nothing that is told of a request may hold: its own keys and the program's secrets."""
    if exchange.secrets is None:
        exchange.secrets = sent_secrets(exchange.head.fields) + held_secrets(app)
    return exchange.secrets


def conceal_error(app: App, exchange: Exchange, error: ProxyError) -> None:
    """Take secrets out of an error that a client is to read, and record it."""
    secrets = secrets_of(app, exchange)
    error.message = hide(error.message, secrets)
    error.code, error.param = conceal([error.code, error.param], secrets)
    if error.details and error.kind != "method":        # its methods are ours
        error.details = conceal(error.details, secrets)
    exchange.record["error"] = "%s: %s" % (error.kind, error.message)


def cors_fields(app: App, head: RequestHead) -> List[Tuple[str, str]]:
    """Headers that let a browser read the answer, where its origin is allowed."""
    if not app.config.cors_origin:
        return []
    allowed = [one.strip() for one in app.config.cors_origin.split(",") if one.strip()]
    origin = head.fields.get("origin", "")
    if not allowed or not (origin or "*" in allowed):
        return []
    if "*" in allowed:
        return [("access-control-allow-origin", "*")]
    if origin not in allowed:
        return [("vary", "Origin")]
    return [("access-control-allow-origin", origin), ("vary", "Origin")]


def start_response(app: App, exchange: Exchange, status: int,
                   fields: List[Tuple[str, str]]) -> bytes:
    """The response head; from here on the exchange counts as answered."""
    exchange.opened = True
    exchange.record["status"] = status
    every = fields + (PRIVATE_FIELDS if exchange.private else cors_fields(app, exchange.head))
    if app.leaving:
        exchange.keep = False
    if not exchange.keep:
        every.append(("connection", "close"))
    elif not exchange.head.minor:
        every.append(("connection", "keep-alive"))
    return response_head(status, every)


async def respond(app: App, exchange: Exchange, status: int, body: bytes,
                  fields: Iterable[Tuple[str, str]] = ()) -> None:
    """A whole response; HEAD gets its head alone (RFC 9110 9.3.2), 204 no length."""
    every = list(fields)
    if status != 204:
        every.append(("content-length", str(len(body))))
    if not exchange.body_read and (exchange.body_begun or not is_small_body(exchange.head)):
        exchange.keep = False       # cheaper than reading what nobody wants
    head = start_response(app, exchange, status, every)
    exchange.wire.write(head if exchange.head.method == "HEAD" else head + body)
    await exchange.wire.drain()


async def respond_json(app: App, exchange: Exchange, status: int, value: Json,
                       fields: Iterable[Tuple[str, str]] = ()) -> None:
    await respond(app, exchange, status, to_json(value), [JSON_TYPE, *fields])


async def read_body(app: App, exchange: Exchange, most: int = 0) -> bytes:
    """The request's body, decoded, of at most so many bytes (0: maxBodyBytes).  Raises ProxyError
    400, 408, 411, 413, 415 or 503."""
    head, most = exchange.head, min(most or app.config.max_body_bytes, app.config.max_body_bytes)
    if head.framing == Framing(False, 0) and "content-length" not in head.fields:
        raise ProxyError("length_required", "A POST needs a body with Content-Length or chunked.")
    if (head.framing.length or 0) > most:
        raise too_large(most)
    if head.fields.get("expect") and head.minor:
        exchange.wire.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    pieces = [piece async for piece in body_pieces(app, exchange, most)]
    coding = head.fields.get("content-encoding", "").strip(" \t").lower()
    return decode_body(b"".join(pieces), coding, most)


async def body_pieces(app: App, exchange: Exchange, most: int) -> Any:
    """The pieces of a request's body as they come, within every limit of time and size."""
    wire, limits = exchange.wire, app.limits
    reader = open_body(exchange.head.framing, "", client_fault)
    exchange.body_begun = True
    began, size = time.monotonic(), 0
    while not reader.done:
        now = time.monotonic()
        if now - began > limits.body_grace and size < (now - began) * limits.body_rate:
            raise ProxyError("slow_client", "The body came too slowly.")
        try:
            alive = bool(wire.buffer) or await wire.fill(now + limits.body_idle)
        except asyncio.TimeoutError:
            raise ProxyError("slow_client", "No byte of the body came for %s."
                             % counted(limits.body_idle, "second")) from None
        if not alive:
            raise ConnectionResetError("the client left in the middle of its request")
        piece = reader.feed(wire.take())
        if reader.broken is not None:
            raise reader.broken
        size += len(piece)
        if size + max(reader.left or 0, 0) > most:      # what a chunk announces counts at once
            raise too_large(most)
        reserve_body(app, exchange, len(piece))
        yield piece
    wire.buffer[:0] = reader.rest
    exchange.body_read = True


def reserve_body(app: App, exchange: Exchange, size: int) -> None:
    """Count a body's bytes against what all bodies together may take."""
    if app.bodies + size > app.limits.bodies:
        raise ProxyError("busy", "Too many large requests at once; try again.", retry_after=1)
    app.bodies += size
    exchange.reserved += size


def release_body(app: App, exchange: Exchange) -> None:
    app.bodies -= exchange.reserved
    exchange.reserved = 0


def is_small_body(head: RequestHead) -> bool:
    """Whether an unwanted body is worth reading, so that the connection can go on."""
    size = head.framing.length or 0
    if head.framing.chunked or "expect" in head.fields:
        return head.framing == Framing(False, 0)
    return size <= DISCARD_BYTES


async def discard_body(app: App, exchange: Exchange) -> bool:
    """Read what is left of a request behind its answer: it must never be taken for the next one.
    False when that cannot be done."""
    try:
        if not exchange.body_read:
            async for _ in body_pieces(app, exchange, DISCARD_BYTES):
                release_body(app, exchange)
    except ProxyError:
        return False
    return True


# === RECORDING ==============================================================
# A request that is over becomes its record, for the page, the metrics and the
# database.  Whoever wants records puts a function into `App.listeners`; it is
# called on the loop, so it must be quick and raise nothing.


def make_record(exchange: Exchange, now: float, total: float) -> Record:
    """What is kept of a generating request; `now` is loop time."""
    known, agent = exchange.record, exchange.head.fields.get("user-agent", "")
    notes, error = known.get("notes"), known.get("error")
    return Record(
        time.time() - (now - exchange.started), known["api"], client_family(agent),
        printable(known.get("asked", ""), 200), printable(known.get("model", ""), 200),
        known.get("key", ""), known.get("status", 499), known.get("stream", False),
        known.get("in"), known.get("out"), known.get("cached"), known.get("reasoning"),
        read_cost(known.get("cost")), known.get("first"), total, known.get("retries", 0),
        redact(notes) if notes else "", printable(error, 500) if error else "",
        known.get("trace") or "")


def keep_record(app: App, exchange: Exchange) -> None:
    """Remember a generating request that is over, and tell whoever listens."""
    if "api" not in exchange.record or exchange.record.get("quiet") or exchange.dry_run:
        return
    clock = time.monotonic
    now = clock()
    total = now - exchange.started
    if exchange.finishing is None or exchange.finishing.done():
        publish_record(app, make_record(exchange, now, total))
        return

    def finished(task: "asyncio.Task[Any]") -> None:
        if not task.cancelled():
            with guarded(app):
                exchange.record["cost"] = task.result()
        publish_record(app, make_record(exchange, clock(), total))

    exchange.finishing.add_done_callback(finished)


def publish_record(app: App, record: Record) -> None:
    app.recent.append(record)
    guard = guarded(app)
    for listener in app.listeners:
        guard.run(listener, record)


# === ITEM MEMORY ============================================================
# Some clients (the AI SDK by default) name an earlier answer's items by their
# id instead of sending them.  So the last few of them, text and thinking only,
# are kept in memory, under the whole digest of the key that they were given to;
# never for a request that says store false, and never on disk.


def remember_items(app: App, digest: str, reply: Reply) -> None:
    """Keep the items of a finished answer; the oldest make room."""
    if not reply.remember or not reply.reason:
        return
    whole = replace(reply, carry_thinking=True)     # a signature stands nowhere else
    for item in responses_body(whole)["output"]:
        data = to_json(item)
        if item["type"] in ("message", "reasoning") and len(data) <= MAX_ITEM_BYTES:
            app.items[digest, item["id"]] = data
    while len(app.items) > MAX_ITEMS:
        del app.items[next(iter(app.items))]


def recall_items(app: App, digest: str, body: Json) -> None:
    """Put the items that are known in the place of references to them."""
    given: Any = body.get("input")
    for index, item in enumerate(given if isinstance(given, list) else []):
        if isinstance(item, dict) and item.get("type") == "item_reference":
            known = app.items.get((digest, str(item.get("id"))))
            if known is not None:
                given[index] = json.loads(known)


# === JOBS ===================================================================
# A request's body made ready to be sent: whichever shape it has, it becomes one
# Prompt, fitted to its model, and one upstream call.  A plain answer whose form
# was asked for is checked here, and asked for once more when it does not hold.


class Job(NamedTuple):
    """A request made ready: what is sent, and how the answer will be read.  `prompt` is kept
    only where the answer may have to be asked for again."""

    spec: CallSpec
    answer: Answer
    notes: List[str]
    ring: Ring
    prompt: Optional[Prompt] = None
    no_answer: bool = False     # max_tokens is 0


def choose_reader(face: Face, body: Json) -> Face:
    """Whose parser reads a body: its shape tells, for clients post any shape at any door."""
    if "input" in body and "messages" not in body:
        return RESPONSES
    return CHAT if face is RESPONSES and "messages" in body and "input" not in body else face


def suit_face(app: App, prompt: Prompt, face: Face, reader: Face, body: Json) -> None:
    """What the answering face shows, where another face's reader could not know it."""
    if face is CHAT:
        prompt.show_thinking = prompt.show_thinking and app.config.include_reasoning
    elif face is MESSAGES and reader is not MESSAGES:
        prompt.show_thinking = prompt.show_thinking and prompt.effort not in (None, "", "none")
    elif face is RESPONSES and reader is not RESPONSES:
        prompt.echo = echo_request(body)


def choose_backend(app: App, body: Json) -> Backend:
    """Who answers: the backend that the model id names, else Command Code.  Raises ProxyError."""
    if not app.vendors:
        return app.home
    name = aliased(read_model_name(body) or "default", app.config)
    return app.vendors.get(split_backend(name, app.vendors)[0], app.home)


def model_of(app: App, asked: str, notes: List[str]) -> Model:
    """The model that a request's `model` means, of whichever backend.  Raises ProxyError."""
    name = aliased(asked or "default", app.config)
    if app.vendors or BRIDGE.match(name):
        backend, model = split_backend(name, app.vendors)
        if backend:
            found = vendor_model("%s/%s" % (backend, model), model, app.config, app.home.models)
            return found._replace(needs_limit=app.vendors[backend].vendor.api.needs_limit)
        asked = asked if model == name else "commandcode/" + model      # and no alias any more
    return resolve_model(asked, app.home.models, app.config, notes)


def read_prompt(app: App, face: Face, digest: str, body: Json, notes: List[str]) -> Prompt:
    """A request's decoded body as a Prompt that is fit to be sent.  Raises ProxyError."""
    recall_items(app, digest, body)
    reader = choose_reader(face, body)
    prompt = reader.parse(body, notes)
    suit_face(app, prompt, face, reader, body)
    model = model_of(app, prompt.asked, notes)
    prompt.model = model.id
    prompt.effort = fit_effort(prompt.effort, model, notes)
    prompt.no_answer = prompt.max_tokens == 0
    if model.needs_limit or prompt.max_tokens is not None:
        prompt.max_tokens = fit_max_tokens(prompt.max_tokens, model, notes)
    repair_prompt(prompt)
    if not model.vision and images_of(prompt):
        add_note(notes, "pictures", "%s takes text alone and may not see them" % model.id)
    return prompt


def count_input(backend: Backend, prompt: Prompt) -> Tuple[int, int, str]:
    """(calibrated estimate, raw estimate, family) of a prompt's input tokens."""
    raw = estimate_input(prompt)
    family = model_family(prompt.model, bool(prompt.tools))
    count = calibrated(raw, backend.calibrations.get(family, Calibration()))
    return count, raw, "" if images_of(prompt) else family      # pictures teach nothing of text


def is_asked(head: RequestHead, name: str) -> bool:
    """Whether a header of ours says yes."""
    return BOOLEAN_WORDS.get(head.fields.get(name, "").lower(), False)


def refuse_notes(exchange: Exchange, face: Face, body: Json, notes: List[str]) -> None:
    """x-ccproxy-strict: what would be a note is a 400, and so is a field that is not known."""
    if not is_asked(exchange.head, "x-ccproxy-strict"):
        return
    note_unknown(body, choose_reader(face, body).fields, notes)
    unique = [note for note in dict.fromkeys(notes) if not note.startswith("json_format=")]
    if unique:
        raise ProxyError("invalid", "Refused because of x-ccproxy-strict: " + format_notes(unique),
                         details={"notes": unique[:100]})


def new_answer(app: App, exchange: Exchange, face: Face, prompt: Prompt, backend: Backend,
               upstream: UpstreamFormat) -> Answer:
    """An empty answer to a prompt."""
    secrets = secrets_of(app, exchange)
    echo = conceal(prompt.echo, secrets) if prompt.echo else {}
    reply = Reply(face.id_prefix + random_hex(24), redact(prompt.asked or prompt.model, secrets),
                  int(time.time()), include_usage=prompt.include_usage,
                  carry_thinking=prompt.carry_thinking, echo=echo, remember=prompt.remember)
    reply.input_estimate, reply.raw_estimate, reply.family = count_input(backend, prompt)
    answer = Answer(face, upstream, reply, prompt, app.config.empty_response_policy == "allow")
    answer.secrets = secrets
    return answer


async def breathe(data: bytes) -> None:
    """Between two steps with a large body: let all others go on for a turn."""
    if len(data) > BIG_BODY_BYTES:
        await asyncio.sleep(0)


def memory_digest(caller: Caller, backend: Backend) -> str:
    """Under what a caller's items are kept: many may share a vendor's key, so not under that."""
    return caller.digest if backend.vendor or not caller.keys else anchor_of(caller.keys).digest


def served_caller(app: App, exchange: Exchange, caller: Caller, backend: Backend) -> Caller:
    """The caller with the key that serves its request: its own or the operator's, or a vendor's.
    Raises ProxyError 401, 403, 503."""
    if backend.vendor is None:
        if caller.refusal is not None:
            raise caller.refusal
        return caller
    if caller.refusal is None:
        admit_borrower(exchange.head.fields, app.operator, exchange.wire.peer_address(),
                       exchange.head.method)
    if backend.key is None:
        raise ProxyError("unavailable", "The proxy has no key for %s: its operator must set one "
                         "(%sKey, or key or keyEnv in vendors)." % (backend.name, backend.name))
    exchange.record["key"] = backend.key.shown
    return caller._replace(keys=(backend.key,), operator=False)


async def prepare(app: App, exchange: Exchange, face: Face, caller: Caller, data: bytes) -> Job:
    """A request's body translated into its upstream call.  Raises ProxyError."""
    notes = list(caller.notes)
    fields = exchange.head.fields
    traceparent = choose_traceparent(fields.get("traceparent", ""), random_hex(48))

    def build(key: RingKey) -> CallSpec:
        prompt.session = derive_session(key.key, named, first)
        return build_call(app, backend, upstream, key.key, prompt, traceparent)

    try:
        body = parse_object(data, notes)
        await breathe(data)
        backend = choose_backend(app, body)
        caller = served_caller(app, exchange, caller, backend)
        keys = caller.keys
        prompt = read_prompt(app, face, memory_digest(caller, backend), body, notes)
        await breathe(data)
        named, first = session_value(fields, prompt.user_id), first_user_text(prompt)
        upstream = upstream_of(app, backend, fields, prompt.model)
        spec = build(keys[0])
        await breathe(data)
        answer = new_answer(app, exchange, face, prompt, backend, upstream)
        answer.comment_end = comment_end(fields.get("user-agent", ""))
    except RecursionError:
        raise ProxyError("invalid", "The body is nested too deeply.") from None
    model = answer.reply.model if prompt.model == prompt.asked else hide(
        prompt.model, answer.secrets)
    exchange.record.update(asked=answer.reply.model if prompt.asked else "", stream=prompt.stream,
                           model="%s/%s" % (backend.name, model) if backend.vendor else model)
    refuse_notes(exchange, face, body, notes)
    routing = read_routing(app.config, fields, prompt.model, upstream.path)
    allowed = [name for key in keys for name in key.allowed_models]
    if allowed:
        routing = routing._replace(names=names_of(prompt.model, allowed, app.home.models,
                                                  app.config))
    conversation = prompt.session if len(keys) == 1 else \
        derive_session(anchor_of(keys).key, named, first)
    ring = Ring(keys, conversation, routing, build if len(keys) > 1 else lambda key: spec,
                caller.operator)
    return Job(spec, answer, notes, ring, prompt if has_checked_format(prompt) else None,
               prompt.no_answer)


def shown_notes(job: Job) -> str:
    """The value of x-ccproxy-notes for an answer, as far as it has come."""
    notes = job.notes + job.answer.reply.notes
    return hide(format_notes(notes), job.answer.secrets) if notes else ""


def answer_fields(job: Job) -> List[Tuple[str, str]]:
    """The headers that every answer carries: its id, and what was changed on the way."""
    reply = job.answer.reply
    fields = [("x-request-id", reply.id), ("request-id", reply.id)]
    notes = shown_notes(job)
    job.answer.noted = len(reply.notes)
    return fields + ([("x-ccproxy-notes", notes)] if notes else [])


NO_CALL = "no_call=max_tokens is 0: the answer is empty, and no upstream is called"


def explain_call(app: App, job: Job) -> Json:
    """The upstream request exactly as it would be sent, its key hidden, and the notes."""
    if job.no_answer:
        return {"method": None, "url": None, "headers": {}, "body": None,
                "notes": list(dict.fromkeys([NO_CALL] + job.notes))}
    line, *rows = job.spec.head.decode("ascii").rstrip("\r\n").split("\r\n")
    method, target, _ = line.split(" ")
    fields = dict(row.split(": ", 1) for row in rows)
    for name, start in (("authorization", "Bearer "), ("x-api-key", "")):
        if name in fields:
            fields[name] = start + key_name(fields[name][len(start):])
    fields.pop("proxy-authorization", None)
    origin = job.spec.backend.origin
    base = "%s://%s" % (origin.scheme, origin.authority)
    return {"method": method, "url": target if "://" in target else base + target,
            "headers": fields, "body": json.loads(job.spec.payload),
            "notes": conceal(list(dict.fromkeys(job.notes)), job.answer.secrets)}


def learn_usage(backend: Backend, reply: Reply) -> None:
    """Calibrate the estimator by a true count (of at most MAX_FAMILIES families)."""
    known = backend.calibrations
    if reply.usage is None or not reply.usage.input or not reply.family:
        return
    if reply.family not in known and len(known) >= MAX_FAMILIES:
        del known[min(known, key=lambda name: known[name].weight)]      # the least known
    if reply.family:
        known[reply.family] = learn_count(known.get(reply.family, Calibration()),
                                          reply.raw_estimate, reply.usage.input)


async def hold_format(app: App, exchange: Exchange, job: Job, key: RingKey) -> Answer:
    """The answer, or a second one where the first is not valid under its schema; a note tells.

    Raises nothing: where the second call fails, the first answer is what there is.
    """
    answer, prompt = job.answer, job.prompt
    violation = format_violation(prompt, answer.reply) if prompt else None
    if prompt is None or violation is None:
        return answer
    add_repair_turns(prompt, answer.reply, violation)
    upstream = job.spec.upstream
    second = new_answer(app, exchange, answer.face, prompt, job.spec.backend, upstream)
    spec = CallSpec(job.spec.backend, b"", b"", upstream)
    relay = Relay(app, exchange.wire, second, spec, lambda: b"")
    try:
        payload = upstream.build(prompt, prompt.session)
        length = b"content-length: %d\r\n" % len(payload)
        relay.spec.head = re.sub(rb"content-length: [0-9]+\r\n", length, job.spec.head)
        relay.spec.payload = payload
        await run_calls(relay, exchange.record, key, job.ring.routing)
        await finish_reading(relay)
    except ProxyError as error:
        app.log.debug("repair of a structured answer failed: %s", printable(hide(
            error.message, answer.secrets), 200))
        add_note(answer.reply.notes, "json_invalid", violation)
        return answer
    finally:
        relay.close()
    note_usage(state_of(app.keys, key, time.time()), second.reply.usage, second.reply.cost)
    learn_usage(job.spec.backend, answer.reply)     # not the second's, whose prompt holds the first
    left = format_violation(prompt, second.reply)
    code = "json_repaired" if left is None else "json_invalid"
    add_note(second.reply.notes, code, left or violation)
    second.reply.notes[:0] = answer.reply.notes
    second.reply.id, second.reply.family = answer.reply.id, ""
    second.reply.usage = add_usage(answer.reply.usage, second.reply.usage)
    second.reply.cost = add_cost(answer.reply.cost, second.reply.cost)
    return second


# === GENERATION =============================================================
# `serve_answer` is the way of every generating request, whichever the face: key
# or ring, body, prompt, call, relay; then what the log and the counters keep.


STREAM_FIELDS = [("content-type", "text/event-stream; charset=utf-8"),
                 ("cache-control", "no-cache, no-transform"), ("x-accel-buffering", "no")]


def open_stream(app: App, exchange: Exchange, job: Job) -> bytes:
    """The response head of a stream; HTTP/1.0 knows no chunks, so there the end is the end."""
    fields = STREAM_FIELDS + answer_fields(job) + [("x-ccproxy-key", exchange.record["key"])]
    if exchange.head.minor:
        fields = fields + [("transfer-encoding", "chunked")]
    else:
        exchange.keep = False
    return start_response(app, exchange, 200, fields)


def caller_of(app: App, exchange: Exchange) -> Caller:
    """Whose request it is; the demo takes any key or none.  Raises ProxyError 400, 401, 403."""
    fields = exchange.head.fields
    if app.demo:
        notes: List[str] = []
        keys = ring_in(fields, notes) or (new_ring_key(DEMO_KEY),)
        caller = Caller(keys, keys[0].digest, False, tuple(notes))
    else:
        peer = exchange.wire.peer_address() if app.operator.loopback else ""
        method = "GET" if exchange.head.method == "HEAD" else exchange.head.method
        caller = find_caller(fields, app.operator, peer, method)
    if caller.notes:
        exchange.record["notes"] = format_notes(caller.notes)
    return caller


def caller_or_borrower(app: App, exchange: Exchange) -> Caller:
    """Whose request it is, which may have no key where vendors are on: their keys are lent, and the
    body tells whether it wants one.  Raises ProxyError 400, 401, 403."""
    try:
        return caller_of(app, exchange)
    except ProxyError as error:
        if not app.vendors or error.status not in (401, 403):
            raise
        head = exchange.head
        admit_borrower(head.fields, app.operator, exchange.wire.peer_address(), head.method)
        return Caller((), hashlib.sha256(b"borrower").hexdigest(), refusal=error)


def note_fields(exchange: Exchange) -> List[Tuple[str, str]]:
    """The header of the notes that are known of a request."""
    notes = exchange.record.get("notes")
    return [("x-ccproxy-notes", notes)] if notes else []


def count_caller(app: App, caller: Caller) -> None:
    """Count a POST against its caller's limit.  Raises ProxyError 429."""
    if app.config.rate_limit_max:
        count_request(app.rates, caller.digest, app.config.rate_limit_max,
                      app.config.rate_limit_window, time.time())


def admit(app: App, caller: Caller) -> None:
    """Count a request against the limits.  Raises ProxyError 429 or 503."""
    config = app.config
    count_caller(app, caller)
    if config.max_total_in_flight and app.in_flight >= config.max_total_in_flight:
        raise ProxyError("busy", "Too many requests at once (maxTotalInFlight); try again.",
                         retry_after=1)


async def run_job(relay: Relay, record: Dict[str, Any], ring: Ring) -> None:
    """The calls of one answer: of a ring key by key, of a single key with its own retries."""
    keys, now = ring.keys, time.time()
    try:
        with relay.app.raiser:
            if len(keys) > 1:
                return await run_ring(relay, record, ring)
            check_single(keys[0], state_of(relay.app.keys, keys[0], now), ring.routing)
            await run_calls(relay, record, keys[0], ring.routing)
    except asyncio.CancelledError:
        if relay.fault is None:
            raise
        raise relay.fault from None     # it was not the client that left
    except ProxyError as error:
        if relay.spec.backend.vendor and error.kind in ("authentication", "permission"):
            error.message = "The operator's key for %s: %s" % (relay.spec.backend.name,
                                                              error.message)
        if not ring.operator or error.kind != "authentication":
            raise
        refused = [key for key in keys if account_state(
            key, state_of(relay.app.keys, key, now), ring.routing, now).word == "refused"]
        raise operator_refusal(error, refused or list(keys)) from None


async def serve_answer(app: App, exchange: Exchange, face: Face) -> None:
    """A generating request, from its key to the last byte of its answer.  Raises ProxyError as
    long as no response head went out; later errors become the stream's last event."""
    exchange.face = face
    exchange.record["api"] = face.name
    caller = caller_or_borrower(app, exchange)
    exchange.record["key"] = caller.keys[0].shown if caller.keys else ""
    admit(app, caller)
    app.in_flight += 1
    try:
        await generate(app, exchange, face, caller)
    finally:
        app.in_flight -= 1
    await exchange.wire.drain()


def empty_frames(answer: Answer) -> bytes:
    """End an answer by max_tokens before anything was shown; its input tokens are an estimate."""
    frames: List[bytes] = []
    answer.allow_empty = True
    answer.reading.usage = Usage(answer.reply.input_estimate, 0)
    add_note(answer.reply.notes, "usage", "not told by the upstream")
    answer.pass_on(End(LENGTH), frames)
    return b"".join(frames)


async def respond_empty(app: App, exchange: Exchange, job: Job) -> None:
    """Answer a request with max_tokens 0 without an upstream call."""
    answer = job.answer
    if answer.stream:
        head = open_stream(app, exchange, job)
        frames = empty_frames(answer)
        exchange.wire.write(head + (chunk(frames) + LAST_CHUNK if exchange.head.minor else frames))
    else:
        empty_frames(answer)
        fields = [*answer_fields(job), ("x-ccproxy-key", exchange.record["key"])]
        await respond_json(app, exchange, 200, answer.body(), fields)
    exchange.record["notes"] = shown_notes(job)


async def generate(app: App, exchange: Exchange, face: Face, caller: Caller) -> None:
    """The same, for a request that was admitted: read, sent on, answered.  Raises ProxyError."""
    record = exchange.record
    if not exchange.dry_run:
        keep_models_fresh(app)
    job = await prepare(app, exchange, face, caller, await read_body(app, exchange))
    release_body(app, exchange)
    if exchange.dry_run:
        await respond_json(app, exchange, 200, explain_call(app, job), answer_fields(job))
        return
    if job.no_answer:
        await respond_empty(app, exchange, job)
        return
    if exchange.wire.ended:
        raise ConnectionResetError("the client left before its request was sent on")
    task = asyncio.current_task()
    exchange.wire.flood_bytes = READ_AHEAD_BYTES
    exchange.wire.on_end = task.cancel if task else None    # the client left: so do we
    exchange.wire.release()
    relay = Relay(app, exchange.wire, job.answer, job.spec,
                  lambda: open_stream(app, exchange, job))
    relay.framed = bool(exchange.head.minor)
    exchange.relay, finishing = relay, False
    try:
        await run_job(relay, record, job.ring)
        if not job.answer.stream:
            await finish_answer(relay)
            if job.prompt is not None:
                job = job._replace(spec=relay.spec)
                job = job._replace(answer=await hold_format(app, exchange, job, relay.key))
            fields = [*answer_fields(job), ("x-ccproxy-key", record["key"]),
                      *cost_fields(job.answer.reply)]
            await respond_json(app, exchange, 200, job.answer.body(), fields)
        elif relay.over.done():
            await finish_answer(relay)
        else:
            finishing = True
            exchange.finishing = spawn(app, finish_answer(relay))
    except ProxyError as error:
        exchange.record["notes"] = shown_notes(job)
        if not relay.opened:
            raise
        conceal_error(app, exchange, error)
        relay.send(job.answer.failure(error), last=True)
    finally:
        if not finishing:
            relay.close()
        record_answer(app, exchange, relay, job)
        exchange.wire.on_end, exchange.wire.flood_bytes = None, 0
    if face is RESPONSES:
        remember_items(app, memory_digest(caller, job.spec.backend), job.answer.reply)


def record_answer(app: App, exchange: Exchange, relay: Relay, job: Job) -> None:
    """What the log line tells of an answer."""
    learn_usage(job.spec.backend, job.answer.reply)
    record, reply = exchange.record, job.answer.reply
    exchange.record["notes"] = shown_notes(job)
    if relay.first:
        record["first"] = relay.first - exchange.started
    if reply.usage is not None:
        record.update({"in": reply.usage.input, "out": reply.usage.output,
                       "cached": reply.usage.cache_read, "reasoning": reply.usage.reasoning})
    record["cost"] = reply.cost


async def finish_answer(relay: Relay) -> Optional[str]:
    """Read to the very end, where the cost is told, and count what the answer took; that cost."""
    await finish_reading(relay)
    reply = relay.answer.reply
    note_usage(state_of(relay.app.keys, relay.key, time.time()), reply.usage, reply.cost)
    return reply.cost


def cost_fields(reply: Reply) -> List[Tuple[str, str]]:
    """What a whole answer cost, where the upstream told it."""
    fields = [("x-ccproxy-cost-usd", reply.cost)] if reply.cost else []
    if reply.usage is not None and reply.usage.cache_read is not None:
        fields.append(("x-ccproxy-cached-tokens", str(reply.usage.cache_read)))
    return fields


# === PART: SERVER ===========================================================
# === ADMIN ==================================================================
# What whoever runs the proxy reads and changes over HTTP, below /admin.  Who may
# is ADMIN ACCESS' decision.  The page itself is without data, so anybody may have
# it.


def admit_by(check: Callable[[Fields, Config, str], None], app: App, exchange: Exchange) -> None:
    """Let pass what a check lets pass, unless too many wrong keys came from that address.  Raises
    ProxyError 401, 403, 429."""
    fields, address = exchange.head.fields, exchange.wire.peer_address()
    refusal = None
    try:
        check(fields, app.config, address)
    except ProxyError as error:
        refusal = error
    if any(key_text(fields, name) for name, _ in KEY_FIELDS):
        wrong = refusal is not None and refusal.kind == "authentication"
        judge_guess(app.guesses, address, wrong, time.monotonic())
    if refusal is not None:
        raise refusal


def admit_reader(app: App, exchange: Exchange) -> None:
    admit_by(check_reader, app, exchange)


def admit_writer(app: App, exchange: Exchange) -> None:
    admit_by(check_writer, app, exchange)


async def serve_dashboard(app: App, exchange: Exchange) -> None:
    app.page = app.page or build_page()
    await respond(app, exchange, 200, app.page.body, app.page.fields)


EXPLAIN_PATH = re.compile("/+explain/")
PATH_PREFIX = re.compile(r"^(/explain)?(/anthropic|/openai|/api(?=/v1(/|$)))?(?=/|$)"
                         r"((/v1)+(?=/|$))?")
# A base URL that names the endpoint already, and the path that its client adds to it.
DOUBLED_PATH = re.compile(r"^((/chat/completions|/messages|/responses|/models(?=(/v1)*/models))"
                          r"(/v1)*(?=/(chat/completions|messages|responses|models)(/|$)))+")


def normal_path(path: str) -> str:
    """A path without what may stand before it (/explain, /anthropic, /openai, /api/v1, /v1 once or
    twice, the endpoint itself) and without slashes behind it."""
    path = PATH_PREFIX.sub("", re.sub(r"/{2,}", "/", path))
    return DOUBLED_PATH.sub("", path).rstrip("/") or "/"


def query_words(head: RequestHead) -> List[str]:
    return head.target.partition("?")[2].split("&")


# === RELOADING ==============================================================
# A new configuration for a program that runs.  Most options are looked at when
# they matter, so it is enough to put them in place, all at once; requests that
# run finish with what they have taken already.  What was derived from an option
# at start follows it by FOLLOWERS.  Options with `at_start` wait.


def raise_descriptor_limit(app: App) -> None:
    """Use all descriptors that the system grants; a relayed answer takes two."""
    app.max_clients = app.config.max_connections
    try:
        import resource
    except ImportError:         # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * app.config.max_connections + 64
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            soft = most
        except (OSError, ValueError) as error:
            app.log.debug("descriptor limit stays at %d: %s", soft, error)
    if soft != resource.RLIM_INFINITY:
        app.max_clients = max(1, min(app.config.max_connections, (soft - 64) // 2))


def follow_log_level(app: App) -> None:
    for logger in (app.log, logging.getLogger("asyncio")):
        logger.setLevel(app.config.log_level.upper())


def follow_cli_version(app: App) -> None:
    """The version sent upstream: the one that is set, or npm's."""
    if app.version_task is not None:
        app.version_task.cancel()
        app.version_task = None
    if app.config.cli_version != "auto":
        app.cli_version = app.config.cli_version
    else:
        app.version_task = spawn(app, keep_running(app, keep_version_fresh))


def follow_model_list(app: App) -> None:
    """The upstream's list of models: asked for at the next request, or no longer used."""
    if not app.config.use_provider_models:
        app.home.models = builtin_models()
    if not app.demo:
        app.home.models_due = 0.0


FOLLOWERS: Dict[str, Callable[[App], None]] = {
    "maxConnections": raise_descriptor_limit, "logLevel": follow_log_level,
    "cliVersion": follow_cli_version, "useProviderModels": follow_model_list,
    "modelRefreshIntervalMs": follow_model_list}


def apply_settings(app: App, settings: Settings) -> List[str]:
    """Put new settings in place as far as they count without a start; the options that changed."""
    config = keep_started(settings.config, app.config)
    changed = changed_options(config, app.config)
    app.settings, app.config, app.operator = settings, config, settings.operator
    for name in changed:
        if name in FOLLOWERS:
            FOLLOWERS[name](app)
    watch_again(app)
    return changed


def settings_files(settings: Settings) -> List[str]:
    """The files whose content the settings are."""
    return [path for path in (settings.path, settings.config.credentials_file, settings.env_file)
            if path]


def file_marks(paths: Iterable[str]) -> Dict[str, Any]:
    """What tells whether files have changed."""
    marks: Dict[str, Any] = {}
    for path in paths:
        try:
            known = os.stat(path)
            marks[path] = (known.st_mtime_ns, known.st_size)
        except OSError:
            marks[path] = None
    return marks


def watch_again(app: App) -> None:
    """What was just read, or written by ourselves, is no change for --watch."""
    if app.watched is not None:
        app.watched.update(file_marks(settings_files(app.settings)))


def log_change(app: App, origin: str, changed: List[str]) -> None:
    """One line about a new configuration: the names, never the values."""
    waiting = waiting_options(app.settings.config, app.config)
    app.log.info("configuration %s: %s; %d operator's keys%s", origin,
                 "changed " + ", ".join(changed) if changed else "nothing changed",
                 len(app.operator.keys),
                 "; restart for " + ", ".join(waiting) if waiting else "")


def log_warnings(app: App, warnings: Iterable[str]) -> None:
    for text in warnings:
        app.log.warning("%s", text)


def check_fresh(app: App, settings: Settings) -> None:
    """What new settings need, now and at the next start.  Raises ProxyError `config`."""
    check_surroundings(settings.config)
    host = app.config.host              # where we listen until then
    check_operator(settings.operator, host)
    check_admin_key(settings.config._replace(host=host))


def reload_settings(app: App) -> None:
    """Read the config file and the operator's keys again; where they are wrong, one line says so
    and all stays as it is."""
    settings = app.settings
    if settings is None:
        return
    try:
        fresh = read_settings(settings.flags, settings.given, settings.env_file)
        check_fresh(app, fresh)
    except ProxyError as error:
        app.log.error("the configuration stays as it is: %s", printable(error.message, 1000))
        return
    log_warnings(app, fresh.warnings)
    log_change(app, "read again", apply_settings(app, fresh))


async def change_in_turn(app: App, work: Callable[[], Any]) -> Any:
    """Run blocking work that changes a file in a thread, one at a time.  The file's lock would
    order the writing alone: what is written last must be put into effect last, too."""
    if app.changing is None:
        app.changing = asyncio.Lock()
    async with app.changing:
        return await in_thread(work)


# === RESTART ================================================================
# The program starts again in the same process and on the same listening sockets
# (SOCKETS HANDED ON), once it has drained: no connection is refused, a running
# answer is finished, and whoever supervises the process notices nothing.  Before
# anything is stopped, the new program must prove that it would start.

HELD_SIGNALS = {getattr(signal, name) for name in (     # those that come in a restart wait
    "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR2", "SIGCHLD") if hasattr(signal, name)}
CHECK_SECONDS = 30.0        # for `--check`, which takes a fraction of one


def can_restart(app: App) -> bool:
    """Whether this platform, and the way in which the proxy runs, let it start again."""
    return app.restartable and app.bare and hasattr(os, "fork") and bool(sys.executable)


def own_arguments() -> List[str]:
    """What stands behind the interpreter's name on our command line."""
    known = getattr(sys, "orig_argv", None)         # from Python 3.10 on
    if known:
        return list(known[1:])
    try:
        with open("/proc/self/cmdline", "rb") as file:
            return [os.fsdecode(word) for word in file.read().split(b"\0")[1:-1]]
    except OSError:
        return list(sys.argv)


def check_program() -> None:
    """Whether the program on disk would start with our arguments.  Raises ProxyError 409."""
    import subprocess
    refused = "The program would not start again, so nothing was done: "
    try:
        done = subprocess.run([sys.executable, *own_arguments(), "--check"], timeout=CHECK_SECONDS,
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE)
        if done.returncode:     # where it does not compile, this tells the line
            with open(os.path.abspath(__file__), "rb") as file:
                compile(file.read(), "ccproxy.py", "exec", dont_inherit=True)
    except (OSError, SyntaxError, ValueError, subprocess.TimeoutExpired) as error:
        raise ProxyError("invalid", refused + printable(str(error), 300), status=409) from None
    if done.returncode:
        words = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no reason"]
        raise ProxyError("invalid", refused + printable(words[0], 300), status=409)


def check_address(app: App) -> None:
    """Whether another address, where the config names one now, can be had.  Raises ProxyError."""
    settings = app.settings
    try:
        fresh = read_settings(settings.flags, settings.given, settings.env_file).config
    except ProxyError as error:
        raise ProxyError("invalid", redact(error.message), param=error.param, status=409) from None
    if (fresh.host, fresh.port) == (app.config.host, app.config.port):
        return
    try:
        close_sockets(bind_sockets(fresh.host, fresh.port))
    except OSError as error:
        raise ProxyError("invalid", "Host %s port %d cannot be had (%s), so nothing was done."
                         % (fresh.host, fresh.port, error.strerror), status=409) from None


def check_restart(app: App) -> None:
    """Whether a restart would do.  Blocks.  Raises ProxyError 409, 501, 503."""
    if not can_restart(app):
        raise ProxyError("not_implemented", "This proxy cannot start itself again here (Windows, "
                         "or run by another program): stop and start it.")
    if app.leaving:
        raise ProxyError("busy", "The proxy stops or starts again already.", retry_after=1)
    check_program()
    check_address(app)


def restart_drain(app: App, head: RequestHead) -> float:
    """The seconds for what runs before a restart: ?drain=N or drainSeconds.  Raises ProxyError."""
    most = app.config.drain_seconds
    given = [word[len("drain="):] for word in query_words(head) if word.startswith("drain=")]
    if not given:
        return most
    if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,3})?", given[-1]) or float(given[-1]) > most:
        raise ProxyError("invalid", "drain must be a number of seconds from 0 to %g "
                         "(drainSeconds)." % most, param="drain")
    return float(given[-1])


def begin_restart(app: App) -> None:
    if not app.stop.is_set():
        app.restarting = True
        app.stop.set()


async def restart_if_sound(app: App, reason: str) -> None:
    """Start again, or say in one line why not."""
    try:
        await in_thread(lambda: check_restart(app))
    except ProxyError as error:
        app.log.error("%s: %s", reason, printable(error.message, 1000))
        return
    app.log.info("%s: starting again", reason)
    begin_restart(app)


def start_again(app: App) -> None:
    """Become the new program.  Raises ProxyError `config`."""
    hand_on(app.server.sockets, app.config)
    flush_output()
    try:
        os.execv(sys.executable, [sys.executable, *own_arguments()])
    except OSError as error:
        raise ProxyError("config", "cannot start again: %s: %s" % (
            sys.executable, error.strerror)) from None


def watched_marks(settings: Settings) -> Dict[str, Any]:
    return file_marks([os.path.abspath(__file__), *settings_files(settings)])


async def watch_files(app: App) -> None:
    """--watch: start again when the program, its config or the operator's keys change."""
    while True:
        await asyncio.sleep(app.limits.watch)
        if app.watched is None or \
                await in_thread(lambda: watched_marks(app.settings)) == app.watched:
            continue
        await asyncio.sleep(app.limits.watch / 2)       # let the writer end, or tell us
        marks, known = watched_marks(app.settings), app.watched
        changed = [path for path, mark in marks.items() if mark != known.get(path)]
        app.watched = marks
        if changed:
            await restart_if_sound(app, "%s has changed" % ", ".join(changed))


# === ADMIN CHANGES ==========================================================
# The endpoints below /admin that show and change the configuration.  Everything
# is checked as at a start before anything is written.


def known_settings(app: App) -> Settings:
    """The settings; without a file to write to where the program that runs us gave none."""
    return app.settings or Settings(
        app.config, {option.name: "default" for option in OPTIONS}, {}, "", {})


async def show_config(app: App, exchange: Exchange) -> None:
    """The configuration without its secrets."""
    admit_reader(app, exchange)
    settings = known_settings(app)
    await respond_json(app, exchange, 200, {
        "file": settings.path or None, "writable": is_writable(settings.path),
        "restart": can_restart(app),
        "restart_needed": waiting_options(settings.config, app.config),
        "options": [option_entry(option, value, settings.sources[option.name])
                    for option, value in zip(OPTIONS, settings.config)]})


def write_config(app: App, settings: Settings, changes: Json) -> Settings:
    """Change the config file; the settings that it then makes.  Raises ProxyError."""
    made: List[Settings] = []

    def edit(old: Optional[bytes]) -> Optional[bytes]:
        try:
            text = (old or b"").decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ProxyError("config", "%s: is not UTF-8" % settings.path) from None
        entries = load_object(text, settings.path)
        merged = {name: value for name, value in {**entries, **changes}.items()
                  if value is not None or name not in changes}      # in the order that they had
        made.append(replace(check_settings(settings.flags, merged, settings.path, settings.given),
                            env_file=settings.env_file))
        check_fresh(app, made[0])
        same = list(merged.items()) == list(entries.items())
        return old if same else dump_object(merged, "", settings.path).encode()

    change_file(settings.path, edit, previous=True)
    return made[0]


async def change_config(app: App, exchange: Exchange) -> None:
    """Entries of the config file written anew, and what came of it."""
    admit_writer(app, exchange)
    body = parse_object(await read_body(app, exchange), [])
    settings = known_settings(app)
    if not settings.path:
        raise ProxyError("invalid", "This proxy was not started from a config file.", status=409)
    try:
        changes = read_changes(body)
        fresh = await change_in_turn(app, lambda: write_config(app, settings, changes))
    except ProxyError as error:
        raise as_refusal(error) from None
    asked = {name: given for name, given in body.items() if given is not None}
    warnings = removed_warnings(settings.flags, os.environ, {**fresh.entries, **asked})
    log_warnings(app, warnings)
    log_change(app, "written over HTTP", apply_settings(app, fresh))
    report = change_report(changes, waiting_options(fresh.config, app.config), fresh.sources)
    await respond_json(app, exchange, 200,
                       {**report, "warnings": list(warnings)} if warnings else report)


async def serve_restart(app: App, exchange: Exchange) -> None:
    """Start the program again, on the same sockets."""
    admit_writer(app, exchange)
    seconds = restart_drain(app, exchange.head)
    await in_thread(lambda: check_restart(app))
    exchange.keep = False
    app.log.info("asked over HTTP: starting again")
    await respond_json(app, exchange, 202, {"status": "restarting"})
    app.drain_within = seconds
    begin_restart(app)


async def show_admin_models(app: App, exchange: Exchange) -> None:
    """All models, those that are switched off among them."""
    admit_reader(app, exchange)
    keep_models_fresh(app)
    off = switched_off(app.home.models, app.config)
    requests = Counter(record.model for record in app.recent)
    named = {meant_id(row["id"], app.home.models, app.config): row["id"]
             for row in app.config.models}
    unlisted = off.difference(map(str.lower, app.home.models.listed))
    shown = [app.home.models.known[name.lower()] for name in app.home.models.listed]
    shown += [app.home.models.known.get(model_id, Model(name, name))
              for model_id, name in named.items() if model_id in unlisted]
    await respond_json(app, exchange, 200, {"models": [
        {**model_entry(model), "id": redact(model.id), "name": redact(model.name),
         "enabled": model.id.lower() not in off, "requests": requests[model.id]}
        for model in shown]})


# === ADMIN KEYS =============================================================
# The endpoints that show and change the operator's keys.  A key is kept only in
# credentialsFile; it comes in once and never comes out again.


def stored_keys(app: App) -> List[Tuple[RingKey, bool]]:
    """All the operator's keys, also those that are not enabled.  Raises ProxyError `config`."""
    path = app.config.credentials_file
    rows = every_credential(credential_rows(read_credentials_file(path)[1], path),
                            path) if path else []
    return rows or [(key, True) for key in app.operator.keys]


async def key_entries(app: App, exchange: Exchange) -> List[Json]:
    """What is shown of each key."""
    stored = await in_thread(lambda: stored_keys(app))
    routing = read_routing(app.config, exchange.head.fields, "", "")
    if not app.demo:
        fresh = "refresh=true" in query_words(exchange.head)
        await await_all_figures(app, tuple(key for key, enabled in stored if enabled),
                                0.0 if fresh else routing.refresh)
    now = time.time()
    return [{"id": id_of(key), "enabled": enabled, "max_in_flight": key.max_in_flight or None,
             **usage_entry(key, state_of(app.keys, key, now), routing, now)}
            for key, enabled in stored]


async def show_keys(app: App, exchange: Exchange) -> None:
    """The operator's keys, redacted, with their fitness."""
    admit_reader(app, exchange)
    path = app.config.credentials_file
    try:
        entries = await key_entries(app, exchange)
    except ProxyError as error:
        raise as_refusal(error) from None
    await respond_json(app, exchange, 200, {
        "file": path or None, "writable": is_writable(path), "policy": app.config.routing_policy,
        "keys": entries})


def write_keys(config: Config, edit: Callable[[List[Any], str], str]) -> Tuple[str, Operator]:
    """Change the rows of credentialsFile, unless it would not do at a start; (the id that `edit`
    gives, the keys from then on).  Raises ProxyError."""
    path = config.credentials_file
    made: List[Tuple[str, Operator]] = []

    def rewrite(old: Optional[bytes]) -> bytes:
        try:
            value, rows = open_credentials((old or b"").decode(), path)
        except UnicodeDecodeError:
            raise credential_fault(path, "is not", "UTF-8") from None
        name = edit(rows, path)
        new = dump_object(value, "", path)
        made.append((name, read_operator(config, new)))
        check_operator(made[0][1], config.host)
        return new.encode()

    change_file(path, rewrite, 0o600)
    return made[0]


KEY_EDITS: Dict[str, Callable[[List[Any], str, Json, str], str]] = {
    "POST": lambda rows, name, body, path: add_credential(rows, body, path),
    "PATCH": change_credential,
    "DELETE": lambda rows, name, body, path: remove_credential(rows, name, path)}


async def edit_keys(app: App, exchange: Exchange) -> None:
    """Add a key of the operator's, change one, or take one out, for all requests that come."""
    admit_writer(app, exchange)
    config, method = app.config, exchange.head.method
    wanted = unquote(normal_path(exchange.head.path)[len("/admin/keys/"):])
    body = {} if method == "DELETE" else parse_object(await read_body(app, exchange), [])
    if not config.credentials_file:
        raise ProxyError("invalid", "The operator's keys can be changed here only where they are "
                         "in a file of their own: set credentialsFile "
                         "(COMMANDCODE_CREDENTIALS_FILE).", status=409)
    try:
        name, app.operator = await change_in_turn(app, lambda: write_keys(
            config, lambda rows, path: KEY_EDITS[method](rows, wanted, body, path)))
        log_warnings(app, odd_key_warnings(app.operator))
        watch_again(app)
        entries = [entry for entry in await key_entries(app, exchange) if entry["id"] == name]
    except ProxyError as error:
        raise as_refusal(error) from None
    app.log.info("operator's keys: %s %s, %d in use", method, printable(name, 64),
                 len(app.operator.keys))
    await respond_json(app, exchange, 201 if method == "POST" else 200,
                       entries[0] if entries else {"id": name, "deleted": True})


# === SCRAPES ================================================================
# GET /metrics: what was counted since the start, and how things stand at this
# moment.  It is of this process alone: a monitoring system adds several up.


def resident_bytes() -> Optional[int]:
    """The process's memory, or its peak, or None where neither can be had."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:         # not Linux
        pass
    try:
        import resource
    except ImportError:     # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else KIB)


def open_descriptors() -> Optional[int]:
    """How many files and sockets the process holds, None where that cannot be had."""
    for folder in ("/proc/self/fd", "/dev/fd"):
        if os.path.isdir(folder):
            return len(os.listdir(folder)) - 1      # without the one that reads the folder
    return None


async def serve_metrics(app: App, exchange: Exchange) -> None:
    """All metrics, for Prometheus; a gauge that is not known is left out.  The label `worker` (1)
    is of versions with several processes, and dashboards ask for it."""
    admit_reader(app, exchange)
    gauges = {("uptime_seconds", "1"): round(time.monotonic() - app.started, 3),
              ("open_streams",): len(app.relays), ("requests_in_flight",): app.in_flight,
              ("client_connections",): app.clients,
              ("upstream_idle_connections",): len(app.home.pool.idle),
              ("resident_memory_bytes", "1"): resident_bytes(),
              ("open_descriptors", "1"): open_descriptors()}
    counts = {**app.metrics.counts, **{key: known for key, known in gauges.items()
                                       if known is not None}}
    share = cache_share(counts)
    if share is not None:
        counts["cache_share_ratio",] = round(share, 6)
    counts["build_info", __version__, "%d.%d.%d" % sys.version_info[:3]] = 1
    await respond(app, exchange, 200, render_metrics(counts).encode(),
                  [("content-type", "text/plain; version=0.0.4; charset=utf-8")])


# === STATE ==================================================================
# What the proxy does right now and did lately, once: /admin/state.  Nothing is
# counted for it while a request runs: it is looked at.

MAX_LIVE = 200              # running requests that are shown: those that run longest


def phase_of(relay: Optional[Relay]) -> str:
    """How far a running request is."""
    if relay is None:
        return "reading"
    answer = relay.answer
    block = answer.reading.live or (answer.reply.blocks[-1] if answer.reply.blocks else None)
    if block is None:
        return "waiting"
    return "thinking" if block.kind == THINKING else "answering"


def live_entry(app: App, exchange: Exchange, seconds: float) -> Json:
    """A running request as the page and `top` show it."""
    if not exchange.number:
        app.numbered += 1
        exchange.number = app.numbered
    record, relay = exchange.record, exchange.relay
    return {"id": exchange.number, "at": round(time.time() - seconds, 1), "api": record["api"],
            "client": client_family(exchange.head.fields.get("user-agent", "")),
            "asked": printable(record.get("asked", ""), 200),
            "model": printable(record.get("model", ""), 200), "key": record.get("key", ""),
            "stream": record.get("stream", False), "seconds": round(seconds, 3),
            "phase": phase_of(relay),
            "output_chars": relay.answer.reply.output_estimate if relay else 0}


def live_entries(app: App) -> List[Json]:
    """The generating requests that run, the longest first."""
    now = time.monotonic()
    running = [one for one in app.exchanges
               if "api" in one.record and not one.record.get("quiet") and not one.dry_run]
    running.sort(key=lambda one: one.started)
    return [live_entry(app, one, now - one.started) for one in running[:MAX_LIVE]]


def state_entry(app: App) -> Json:
    """What the proxy is and does, without its past."""
    return {
        "version": __version__, "status": "draining" if app.leaving else "ok",
        "upstream": {"kind": "demo" if app.demo else app.config.upstream,
                     "address": upstream_address(app)},
        "uptime_seconds": round(time.monotonic() - app.started, 1),
        "open_streams": len(app.relays), "in_flight": app.in_flight, "clients": app.clients,
        "admin_key": bool(app.config.admin_key), "operator_keys": len(app.operator.keys),
        "live": live_entries(app), "alerts": app.alerts}


async def serve_state(app: App, exchange: Exchange) -> None:
    """All that the page shows at first."""
    admit_reader(app, exchange)
    await respond_json(app, exchange, 200, {
        **state_entry(app), "recent": [one._asdict() for one in reversed(app.recent)],
        "minutes": minute_entries(app.minutes, time.time())})


# === LIVE EVENTS ============================================================
# /admin/events goes on telling what /admin/state told once.  A follower (a
# reader of these events) has a bounded queue: who reads too slowly loses the
# oldest and is told how many.  One task looks once a second as long as there
# are followers.  They are not requests that run: no limit counts them, and the
# proxy does not wait for them when it stops.

MAX_UNREAD_EVENTS = 200     # of one follower


@dataclass(eq=False, **SLOTS)
class Follower:
    """A reader of the events, and what waits until it can take it."""

    wire: Wire
    framed: bool                    # chunked; else (HTTP/1.0) the end is the connection's
    frames: Deque[bytes] = field(default_factory=deque)
    state: bytes = b""              # the newest state, in place of an older one
    lost: int = 0                   # events, since it was last told so
    ended: bool = False             # nothing more will be added


def changing_state(app: App) -> Json:
    """What is told again and again: the state with the current minute."""
    number = int(time.time() // 60)
    return {**state_entry(app),
            "minute": minute_entry(number, app.minutes.get(number, Minute()))}


async def watch_state(app: App) -> None:
    """Tell all followers of each change, at most once a second.  (A request that runs changes
    its seconds.)"""
    known: Json = {}
    while True:
        await asyncio.sleep(app.limits.news)
        state = changing_state(app)
        changed = {**state, "uptime_seconds": 0}
        if changed != known:
            known, frame = changed, event_frame("state", state)
            for follower in app.followers:
                follower.state = frame
                follower.wire.wake()


def tell_record(app: App, record: Record) -> None:
    """Tell all followers of a request that is over."""
    frame = event_frame("request", record._asdict())
    for follower in app.followers:
        follower.frames.append(frame)
        if len(follower.frames) > MAX_UNREAD_EVENTS:
            follower.frames.popleft()
            follower.lost += 1
        follower.wire.wake()


def take_frames(follower: Follower) -> bytes:
    """All that waits for a follower."""
    lost = event_frame("lost", {"count": follower.lost}) if follower.lost else b""
    data = b"".join([lost, *follower.frames, follower.state])
    follower.frames.clear()
    follower.state, follower.lost = b"", 0
    return data


async def feed_follower(app: App, follower: Follower) -> None:
    """Write whatever comes up until the follower leaves or the proxy stops."""
    wire, clock = follower.wire, time.monotonic
    wrap = chunk if follower.framed else bytes      # an empty chunk is the last one
    while not wire.ended:
        data = b"" if wire.blocked_since else take_frames(follower)
        if data:
            wire.write(wrap(data))
        elif follower.ended:
            wire.write(wrap(b""))
            return
        else:
            try:        # one who reads nothing is dropped by the sweep
                await wire.wait(0.0 if wire.blocked_since else clock() + app.limits.silence)
            except asyncio.TimeoutError:
                follower.frames.append(comment_frame("nothing new"))


def end_followers(app: App) -> None:
    """The proxy stops: tell all followers and end their streams; who does not read is left."""
    if not app.followers:
        return
    frame = event_frame("state", changing_state(app))
    for follower in list(app.followers):
        follower.state, follower.ended = frame, True
        if follower.wire.blocked_since:
            follower.wire.abort()
        follower.wire.wake()


async def serve_events(app: App, exchange: Exchange) -> None:
    """The state and every request that is over, as they come."""
    admit_reader(app, exchange)
    if app.draining:
        raise stopping_error()
    if len(app.followers) >= app.limits.followers:
        raise ProxyError("busy", "Too many read these events already.", retry_after=10)
    wire, framed = exchange.wire, exchange.head.minor > 0
    exchange.keep = exchange.keep and framed
    fields = STREAM_FIELDS + ([("transfer-encoding", "chunked")] if framed else [])
    wire.write(start_response(app, exchange, 200, fields))
    if exchange.head.method == "HEAD":
        return
    follower = Follower(wire, framed, state=event_frame("state", changing_state(app)))
    if not app.followers:
        app.watching = spawn(app, keep_running(app, watch_state))
        app.telling = partial(tell_record, app)
        app.listeners.append(app.telling)
    app.followers.add(follower)
    wire.flood_bytes = READ_AHEAD_BYTES
    wire.release()
    try:
        await feed_follower(app, follower)
    finally:
        wire.flood_bytes = 0
        app.followers.discard(follower)
        if not app.followers:
            app.watching.cancel()
            app.listeners.remove(app.telling)


# === USAGE LOG ==============================================================
# Every record in an SQLite file (usageDb), which several processes may share.
# The loop does nothing but append to a queue; one thread writes it, a batch a
# second.  What goes wrong with the file costs one line, and one more when it is
# over: records wait in the queue, which is bounded, and no request ever does.
# USAGE_VERSIONS is the file's history: a later version of it is one more entry.

USAGE_VERSIONS = ((
    "CREATE TABLE requests (at REAL NOT NULL, api TEXT, client TEXT, asked TEXT, model TEXT, "
    "key TEXT, status INTEGER, stream INTEGER, input INTEGER, output INTEGER, cached INTEGER, "
    "reasoning INTEGER, cost REAL, first REAL, total REAL, retries INTEGER, notes TEXT, "
    "error TEXT, trace TEXT)", "CREATE INDEX requests_at ON requests (at)"),)
USAGE_MARK = 0x63637078             # application_id: "ccpx"
MAX_UNWRITTEN = 10_000              # records, about 10 MB
USAGE_BATCH = 200
USAGE_CLEANING_SECONDS = 3600.0     # how often what is too old is deleted,
USAGE_CLEANING_ROWS = 5000          # so many at once


def state_folder() -> str:
    """Where this platform wants a program to keep what it remembers."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Application Support"
    else:
        base = os.environ.get("XDG_STATE_HOME", "")
        base = base if os.path.isabs(base) else "~/.local/state"
    return os.path.join(os.path.expanduser(base), "ccproxy")


def usage_path(config: Config) -> str:
    """The database's file, "" for none."""
    if config.usage_db == "auto":
        return os.path.join(state_folder(), "usage.db")
    return os.path.abspath(os.path.expanduser(config.usage_db)) if config.usage_db else ""


def storable(value: Any) -> Any:
    """A member of a record as SQLite can take it, whatever the upstream told."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return min(value, MAX_COUNT) if isinstance(value, int) else value


def check_schema(db: Any) -> int:
    """How many of USAGE_VERSIONS a file has.  Raises ValueError for one that is not ours."""
    version, mark = (db.execute("PRAGMA " + name).fetchone()[0]
                     for name in ("user_version", "application_id"))
    if mark != USAGE_MARK and db.execute("SELECT 1 FROM sqlite_master").fetchone():
        raise ValueError("is a database of another program")
    if version > len(USAGE_VERSIONS):
        raise ValueError("was made by a newer ccproxy (its format is %d, this one knows %d)"
                         % (version, len(USAGE_VERSIONS)))
    return int(version)


def make_schema(db: Any) -> None:
    """Bring a file to the newest version.  Raises ValueError, sqlite3.Error."""
    with db:
        db.execute("BEGIN IMMEDIATE")       # other processes may be about to do the same
        for statements in USAGE_VERSIONS[check_schema(db):]:
            for statement in statements:
                db.execute(statement)
        db.execute("PRAGMA application_id = %d" % USAGE_MARK)
        db.execute("PRAGMA user_version = %d" % len(USAGE_VERSIONS))


def open_usage(path: str, seconds: float) -> Any:
    """The database, made where there is none.  Raises OSError, ValueError, sqlite3.Error."""
    import sqlite3
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    if not os.path.exists(path):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    db = sqlite3.connect(path, timeout=seconds, isolation_level=None)
    try:
        make_schema(db)
        for name in (path, path + "-wal", path + "-shm"):   # SQLite gives all the first's mode
            if readable_by_others(name):
                os.chmod(name, 0o600)
        try:
            db.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError:    # another process is just doing it, and it lasts
            pass
        db.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        db.close()
        raise
    return db


class UsageLog:
    """The queue of records, and the thread that writes them."""

    def __init__(self, path: str, app: App) -> None:
        import threading
        self.path, self.app = path, app
        self.queue: Deque[Record] = deque()
        self.full = threading.Event()       # a batch, or the end has come
        self.ending = self.failing = False
        self.lost = 0                       # since it began to fail
        self.db: Any = None
        self.inode = self.cleaned = 0.0
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def add(self, record: Record) -> None:
        """Queue a record; called on the loop."""
        if len(self.queue) >= MAX_UNWRITTEN:
            self.lose(1)
            return
        self.queue.append(record)
        if len(self.queue) == USAGE_BATCH:
            self.full.set()

    def lose(self, number: int) -> None:
        self.lost += number
        self.app.metrics.counts["usage_records_lost_total",] += number

    def run(self) -> None:
        """Write what is queued, until the end."""
        self.write()            # opens the file: what is wrong with it is said at the start
        last = False
        while not last:
            limits = self.app.limits
            self.full.wait(limits.usage_retry if self.failing else limits.usage_batch)
            self.full.clear()
            last = self.ending
            while self.queue and self.write():
                pass
        self.close()

    def write(self) -> bool:
        """Write one batch; False when that failed.  What is not written stays queued."""
        import sqlite3
        batch = [self.queue[place] for place in range(min(len(self.queue), 5 * USAGE_BATCH))]
        with guarded(self.app, lambda fault: self.fail(type(fault).__name__)):
            try:
                self.open()
                self.insert(batch)
                for _ in batch:
                    self.queue.popleft()
                self.clean()
            except (sqlite3.Error, OSError, ValueError) as error:
                self.fail(str(getattr(error, "strerror", None) or error))
                return False
            if self.failing:
                self.failing = False
                self.app.log.warning("usageDb %s works again; %s lost", self.path,
                                     counted(self.lost, "record"))
                self.lost = 0
            return True
        return False

    def fail(self, problem: str) -> None:
        """Let go of the file, and say once what is wrong."""
        self.close()
        if not self.failing:
            self.failing, self.lost = True, 0
            self.app.log.error("usageDb %s: %s; records wait for it, %d at most", self.path,
                               printable(problem, 200), MAX_UNWRITTEN)

    def open(self) -> None:
        """Open the file where it is not, or is not the one that stands there now."""
        if not os.path.exists(self.path) or os.stat(self.path).st_ino != self.inode:
            self.close()
        if self.db is None:
            self.db = open_usage(self.path, self.app.limits.usage_busy)
            self.inode, self.cleaned = os.stat(self.path).st_ino, 0.0

    def insert(self, batch: List[Record]) -> None:
        """Insert all of them or none."""
        if batch:
            with self.db:
                self.db.execute("BEGIN IMMEDIATE")
                self.db.executemany("INSERT INTO requests (%s) VALUES (%s)" % (
                    ", ".join(Record._fields), ", ".join("?" * len(Record._fields))),
                    [tuple(map(storable, record)) for record in batch])

    def clean(self) -> None:
        """Delete what is older than usageDays, now and then and some at a time."""
        now = time.time()
        if 0 <= now - self.cleaned < USAGE_CLEANING_SECONDS:
            return
        deleted = self.db.execute(
            "DELETE FROM requests WHERE rowid IN (SELECT rowid FROM requests WHERE at < ? LIMIT ?)",
            (now - self.app.config.usage_days * DAY_SECONDS, USAGE_CLEANING_ROWS)).rowcount
        if deleted < USAGE_CLEANING_ROWS:
            self.cleaned = now

    def close(self) -> None:
        """Let go of the file; only the thread does."""
        db, self.db = self.db, None
        if db is not None:
            db.close()

    def end(self, seconds: float) -> None:
        """Write what is left, for so long at most."""
        self.ending = True
        self.full.set()
        self.thread.join(seconds)
        if self.queue:
            self.lose(len(self.queue))
            self.app.log.error("usageDb %s: %s lost", self.path, counted(self.lost, "record"))


def start_usage_log(app: App) -> None:
    """Write all records to usageDb, where one is wanted."""
    path = usage_path(app.config)
    if not path:
        return
    try:
        import sqlite3
        app.log.debug("usageDb %s: SQLite %s", path, sqlite3.sqlite_version)
    except ImportError:
        app.log.error("usageDb: this Python has no sqlite3; no requests are kept")
        return
    app.usage = UsageLog(path, app)
    app.listeners.append(app.usage.add)


async def end_usage_log(app: App) -> None:
    if app.usage is not None:
        await in_thread(lambda: app.usage.end(app.limits.usage_end))


# === INSTANCE KEY ===========================================================
# How a command knows that the proxy on a port is run by the same user before it
# sends a key there: 32 random bytes in the state folder, which that user alone
# can read, and with them the answer to a nonce.  The port is part of the answer:
# no program can get it from the real proxy, on another port, and pass it on.

NONCE = re.compile("[0-9a-fA-F]{32,128}")
INSTANCE_KEY_BYTES = 32


def read_instance_key() -> bytes:
    """This user's key, made where there is none.  Raises OSError, ProxyError, and ValueError for a
    file that is not to be trusted."""
    path = os.path.join(state_folder(), "instance.key")
    if not os.path.isabs(path):
        raise ValueError("this account has no home folder")
    if not os.path.exists(path):
        change_file(path, lambda old: old or os.urandom(INSTANCE_KEY_BYTES), 0o600,
                    folder_mode=0o700)
    with open(path, "rb") as file:
        known, key = os.fstat(file.fileno()), file.read(INSTANCE_KEY_BYTES + 1)
    if os.name == "posix" and (known.st_mode & 0o077 or known.st_uid != os.geteuid()):
        raise ValueError("%s can be read by other accounts, or belongs to one: delete it" % path)
    if len(key) != INSTANCE_KEY_BYTES:
        raise ValueError("%s does not hold %d bytes: delete it" % (path, INSTANCE_KEY_BYTES))
    return key


def instance_proof(nonce: str, port: int) -> str:
    """The answer to a nonce of the proxy that listens on a port.  Raises as `read_instance_key`."""
    return hmac.digest(read_instance_key(), ("%s:%d" % (nonce, port)).encode(), "sha256").hex()


def read_nonce(head: RequestHead) -> str:
    """The nonce in a query, "" where there is none.  Raises ProxyError 400."""
    given = [word[len("nonce="):] for word in query_words(head) if word.startswith("nonce=")]
    if given and not NONCE.fullmatch(given[0]):
        raise ProxyError("invalid", "nonce must be 32 to 128 hex digits.", param="nonce")
    return given[0] if given else ""


def proof_entry(app: App, nonce: str, port: int) -> Json:
    """What /health?nonce= adds; {} where no key can be had, as in a container that writes nowhere.
    The log says so, first at the start."""
    try:
        return {"proof": instance_proof(nonce, port)}
    except (OSError, ValueError, ProxyError) as error:
        app.log.warning("no instance key (`run` and `top` need --url): %s", error)
        return {}


# === ENDPOINTS ==============================================================
# One function per route and the table of routes.  Errors of any function here
# are raised and shown in one place (SERVER).


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
ALL_METHODS = ", ".join(METHODS)


class Route(NamedTuple):
    """A path's methods; `quiet` routes are logged at debug level only, `private` ones are for no
    page of another origin, whatever corsOrigin says."""

    methods: Dict[str, Callable[[App, Exchange], Awaitable[None]]]
    quiet: bool = False
    private: bool = False


def face_of_path(head: RequestHead) -> Face:
    """Whose error shape a request gets that reached no face: Anthropic's where it looks so."""
    if "anthropic-version" in head.fields or "/messages" in head.path:
        return MESSAGES
    return CHAT


def shown_path(head: RequestHead) -> str:
    """A path as it may be shown: decoded first, so that no key hides in it."""
    return printable(unquote(head.path), 100)


def serve_chat(app: App, exchange: Exchange) -> Awaitable[None]:
    return serve_answer(app, exchange, CHAT)


def serve_messages(app: App, exchange: Exchange) -> Awaitable[None]:
    return serve_answer(app, exchange, MESSAGES)


def serve_responses(app: App, exchange: Exchange) -> Awaitable[None]:
    return serve_answer(app, exchange, RESPONSES)


async def count_tokens(app: App, exchange: Exchange, face: Face) -> int:
    """The estimated input tokens of a request; nobody is asked (FIELD 3)."""
    exchange.face = face
    exchange.record["api"] = face.name
    caller = Caller((), "")     # will do: it is wanted for references alone
    try:
        caller = caller_or_borrower(app, exchange)
    except ProxyError:
        app.log.debug("tokens are counted for nobody in particular")
    else:
        count_caller(app, caller)
    data = await read_body(app, exchange)
    try:
        body = parse_object(data, [])
        backend = choose_backend(app, body)
        prompt = read_prompt(app, face, memory_digest(caller, backend), body, [])
        return count_input(backend, prompt)[0]
    except RecursionError:
        raise ProxyError("invalid", "The body is nested too deeply.") from None


async def serve_messages_count(app: App, exchange: Exchange) -> None:
    tokens = await count_tokens(app, exchange, MESSAGES)
    await respond_json(app, exchange, 200, {"input_tokens": tokens}, note_fields(exchange))


async def serve_responses_count(app: App, exchange: Exchange) -> None:
    tokens = await count_tokens(app, exchange, RESPONSES)
    await respond_json(app, exchange, 200, {
        "object": "response.input_tokens", "input_tokens": tokens}, note_fields(exchange))


async def refuse_websocket(app: App, exchange: Exchange) -> None:
    """Codex tries a WebSocket first: answered at once, it goes on over HTTP (FIELD 33)."""
    if "upgrade" not in exchange.head.fields:
        raise ProxyError("not_found", "Responses are not stored here: there is nothing to get.")
    raise ProxyError("upgrade", "WebSocket is not spoken here: use POST.")


async def refuse_stored(app: App, exchange: Exchange) -> None:
    raise ProxyError("not_found", "Responses are not stored here: there is no %s."
                     % shown_path(exchange.head))


async def fresh_models(app: App) -> List[Model]:
    """The models to show, after a moment's wait for a list that is due."""
    refresh = keep_models_fresh(app)
    if refresh is not None:
        await asyncio.wait([refresh], timeout=app.limits.list_wait)
    return listed_models(app.home.models, app.config)


def may_borrow(app: App, exchange: Exchange) -> bool:
    """Whether a request may use the vendors' keys."""
    head = exchange.head
    try:
        admit_borrower(head.fields, app.operator, exchange.wire.peer_address(), head.method)
    except ProxyError:
        return False
    return True


def lent_models(app: App, exchange: Exchange) -> List[Model]:
    """The models of vendors, for who may use them, but for those that are not allowed."""
    found = []
    for backend in app.vendors.values() if may_borrow(app, exchange) else ():
        for model in backend.vendor.models if backend.vendor else ():
            whole = "%s/%s" % (backend.name, model)
            try:
                vendor_model(whole, model, app.config, app.home.models)
            except ProxyError:
                continue
            found.append(Model(whole, model, owner=backend.name))
    return found


async def serve_models(app: App, exchange: Exchange) -> None:
    """The list, in Anthropic's shape for its clients (they send anthropic-version, R5)."""
    shown = await fresh_models(app) + lent_models(app, exchange)
    make = anthropic_model_list if exchange.face is MESSAGES else openai_model_list
    await respond_json(app, exchange, 200, make(shown))


def choose_shown(app: App, name: str, shown: List[Model]) -> Optional[Model]:
    """The model of a list that a name means: a vendor's by its own id alone."""
    plain = BRIDGE.sub("", aliased(name, app.config)).lower()
    found = None if plain.partition("/")[0] in app.vendors else find_model(plain, app.home.models)
    wanted = {name.lower(), found.id.lower() if found else plain}
    return next((one for one in shown if one.id.lower() in wanted), None)


async def serve_model(app: App, exchange: Exchange) -> None:
    """One model by its id, which arrives percent-encoded (R4)."""
    name = unquote(normal_path(exchange.head.path)[len("/models/"):])
    shown = await fresh_models(app) + lent_models(app, exchange)
    found = find_model(aliased(name, app.config), app.home.models)
    refuse_switched_off(found.id if found else name, app.home.models, app.config)
    model = choose_shown(app, name, shown)
    if model is None:
        raise unknown_model(name, tuple(one.id for one in shown))
    make = anthropic_model if exchange.face is MESSAGES else openai_model
    await respond_json(app, exchange, 200, make(model))


# Clients with a provider for Ollama ask these before they use /v1/chat/completions (Ollama's API
# documentation: version, tags, show).
OLLAMA = CHAT._replace(error=lambda error: {"error": error.message})


async def serve_ollama_version(app: App, exchange: Exchange) -> None:
    await respond_json(app, exchange, 200, {"version": __version__})


async def serve_ollama_tags(app: App, exchange: Exchange) -> None:
    shown = await fresh_models(app)
    await respond_json(app, exchange, 200, {"models": [ollama_model(model) for model in shown]})


async def serve_ollama_show(app: App, exchange: Exchange) -> None:
    """What is known of one model; :latest is what a name without a tag means to Ollama."""
    exchange.face = OLLAMA
    body = parse_object(await read_body(app, exchange, DISCARD_BYTES), [])
    name = body.get("model") or body.get("name")
    if not isinstance(name, str):
        raise ProxyError("invalid", "model is required", param="model")
    model = choose_shown(app, re.sub(":latest$", "", name), await fresh_models(app))
    if model is None:
        raise ProxyError("model", "model '%s' not found" % printable(name, 100), param="model")
    await respond_json(app, exchange, 200, ollama_details(model))


def vendor_states(app: App, exchange: Exchange) -> List[Json]:
    """The vendors as /health shows them; why one is unavailable, only to who may use it."""
    detail = {"detail": "no key is set"} if may_borrow(app, exchange) else {}
    return [{"name": name, "state": "ready"} if backend.key else {
        "name": name, "state": "unavailable", **detail} for name, backend in app.vendors.items()]


async def serve_health(app: App, exchange: Exchange) -> None:
    """How the proxy is; to a nonce, whose it is.  Raises ProxyError 400."""
    now = time.monotonic()
    nonce = read_nonce(exchange.head)
    await respond_json(app, exchange, 503 if app.leaving else 200, {
        "status": "draining" if app.leaving else "ok", "version": __version__,
        "upstream": upstream_address(app),
        "uptime_seconds": round(now - app.started, 1), "open_streams": len(app.relays),
        "worker": 1, "workers": 1,      # kept for one version, for what reads them
        "operator_keys": len(app.operator.keys), "routing_policy": app.config.routing_policy,
        "token_estimate": {family: {"answers": round(known.weight, 1),
                                    "mean_error": round(known.error, 3)}
                           for family, known in sorted(app.home.calibrations.items())},
        **({"backends": vendor_states(app, exchange)} if app.vendors else {}),
        **(await in_thread(partial(proof_entry, app, nonce, exchange.wire.local_port()))
           if nonce else {})})


async def show_usage(app: App, exchange: Exchange, caller: Caller, fresh: bool) -> None:
    """Where keys stand, after a wait for figures that are due (`fresh`: all of them)."""
    exchange.record["key"] = caller.keys[0].shown
    routing = read_routing(app.config, exchange.head.fields, "", "")
    if not app.demo:
        await await_all_figures(app, caller.keys, 0.0 if fresh else routing.refresh)
    body = usage_body(app.keys, caller, routing, time.time())
    if "format=text" in query_words(exchange.head):
        await respond(app, exchange, 200, usage_text(body).encode(), [
            ("content-type", "text/plain; charset=utf-8"), *note_fields(exchange)])
        return
    await respond_json(app, exchange, 200, body, note_fields(exchange))


async def serve_usage(app: App, exchange: Exchange) -> None:
    """Where the caller's own keys stand (the operator's, for who may use them)."""
    await show_usage(app, exchange, caller_of(app, exchange), False)


async def serve_credentials(app: App, exchange: Exchange) -> None:
    """Where the operator's keys stand, for who presents clientKey."""
    operator = app.operator
    if not (operator.client_key and presents_client_key(exchange.head.fields,
                                                        operator.client_key)):
        sent = exchange.head.fields.get("authorization", "").strip()
        problem = "The clientKey sent is wrong" if sent else "No clientKey was sent"
        raise ProxyError("authentication", "%s: this wants the proxy's own clientKey as "
                         "`Authorization: Bearer ...`." % (
                             problem if operator.client_key else "No clientKey is set"))
    if not operator.keys:
        raise ProxyError("not_found", "No operator's keys are configured.")
    await show_usage(app, exchange, Caller(operator.keys, "", True),
                     "refresh=true" in query_words(exchange.head))


async def serve_root(app: App, exchange: Exchange) -> None:
    """What a person sees who opens the address in a browser."""
    text = ("ccproxy %s\n\nPOST /v1/chat/completions   OpenAI Chat Completions\n"
            "POST /v1/messages           Anthropic Messages\n"
            "POST /v1/responses          OpenAI Responses\n"
            "POST /v1/messages/count_tokens\nGET  /v1/models\nGET  /health\n"
            "GET  /dashboard             what it does, for a browser\n\n"
            "Send your own Command Code key as `Authorization: Bearer user_...`.\n" % __version__)
    await respond(app, exchange, 200, text.encode(), [("content-type", "text/plain")])


async def serve_noise(app: App, exchange: Exchange) -> None:
    """Probes and telemetry that clients send to their own vendor: taken, kept nowhere."""
    await respond_json(app, exchange, 200, {})


async def serve_options(app: App, exchange: Exchange) -> None:
    """A CORS preflight: answered before any key is looked at (FIELD 61)."""
    fields = [("allow", ALL_METHODS)]
    exchange.private = normal_path(exchange.head.path).startswith(("/admin/", "/metrics"))
    granted = [] if exchange.private else cors_fields(app, exchange.head)
    if any(name == "access-control-allow-origin" for name, _ in granted):
        wanted = redact(exchange.head.fields.get("access-control-request-headers", "*")[:4000])
        fields += [("access-control-allow-methods", ALL_METHODS),
                   ("access-control-allow-headers", wanted[:1000]),
                   ("access-control-max-age", "600")]
    await respond(app, exchange, 204, b"", fields)


ROUTES = {
    "/": Route({"GET": serve_root}, quiet=True),
    "/health": Route({"GET": serve_health}, quiet=True),
    "/chat/completions": Route({"POST": serve_chat}),
    "/messages": Route({"POST": serve_messages}),
    "/messages/count_tokens": Route({"POST": serve_messages_count}, quiet=True),
    "/responses": Route({"POST": serve_responses, "GET": refuse_websocket}),
    "/responses/input_tokens": Route({"POST": serve_responses_count}, quiet=True),
    "/models": Route({"GET": serve_models}),
    "/usage": Route({"GET": serve_usage}),
    "/metrics": Route({"GET": serve_metrics}, quiet=True, private=True),
    "/dashboard": Route({"GET": serve_dashboard}, quiet=True),
    "/admin": Route({"GET": serve_dashboard}, quiet=True),
    "/admin/commandcode/credentials": Route({"GET": serve_credentials}, private=True),
    "/admin/state": Route({"GET": serve_state}, quiet=True, private=True),
    "/admin/events": Route({"GET": serve_events}, quiet=True, private=True),
    "/admin/config": Route({"GET": show_config, "PUT": change_config}, private=True),
    "/admin/restart": Route({"POST": serve_restart}, private=True),
    "/admin/models": Route({"GET": show_admin_models}, quiet=True, private=True),
    "/admin/keys": Route({"GET": show_keys, "POST": edit_keys}, private=True),
    "/api/hello": Route({"GET": serve_noise}, quiet=True),
    "/api/event_logging/batch": Route({"POST": serve_noise}, quiet=True),
    "/api/event_logging/v2/batch": Route({"POST": serve_noise}, quiet=True),
    "/api/version": Route({"GET": serve_ollama_version}, quiet=True),
    "/api/tags": Route({"GET": serve_ollama_tags}, quiet=True),
    "/api/show": Route({"POST": serve_ollama_show}, quiet=True)}
ONE_MODEL = Route({"GET": serve_model})
ONE_RESPONSE = Route({"GET": refuse_stored, "DELETE": refuse_stored, "POST": refuse_stored})
ONE_KEY = Route({"PATCH": edit_keys, "DELETE": edit_keys}, private=True)
PLAIN_PATHS = frozenset(ROUTES) | {"/v1" + path for path in ROUTES}
PREFIXES = {"/models/": ONE_MODEL, "/responses/": ONE_RESPONSE, "/admin/keys/": ONE_KEY}


API_PATH = re.compile(r"/(chat/completions|messages(/count_tokens)?|responses(/input_tokens)?|"
                      r"models(/[^/]+)?)$")


def unknown_path(head: RequestHead, path: str) -> ProxyError:
    """A 404; where only what stands before a known path is wrong, it names the base URL to set."""
    words = ("Served are POST /v1/chat/completions, POST /v1/messages, POST /v1/responses, "
             "GET /v1/models, GET /health.")
    if API_PATH.search(path):
        scheme = "https" if head.fields.get("x-forwarded-proto") == "https" else "http"
        base = "%s://%s" % (scheme, printable(head.fields.get("host") or "HOST:PORT", 200))
        words = ("Set the client's base URL to %s/v1 (OpenAI clients) or %s (Anthropic clients)."
                 % (base, base))
    return ProxyError("not_found", "There is no %s here. %s" % (shown_path(head), words))


def find_route(head: RequestHead) -> Route:
    """The route of a path.  Raises ProxyError 404."""
    path = head.path[3:] if head.path[:4] == "/v1/" else head.path
    if path not in ROUTES:
        path = normal_path(head.path)
    route = ROUTES.get(path) or next(
        (route for prefix, route in PREFIXES.items() if path.startswith(prefix)), None)
    if route is None:
        raise unknown_path(head, path)
    return route


def record_request(app: App, exchange: Exchange) -> None:
    """Remember what was asked for; the methods and paths that are ours hold no secret."""
    method, path = exchange.head.method, exchange.head.path
    if method not in METHODS or path not in PLAIN_PATHS:
        secrets = secrets_of(app, exchange)
        method = hide(method, secrets)
        path = hide(unquote(path[:4 * MAX_LOG_VALUE]), secrets)
    exchange.record.update(method=method, path=path)


def serve_request(app: App, exchange: Exchange) -> Awaitable[None]:
    """Find a request's route and method and start it.  Raises ProxyError 404 or 405."""
    head = exchange.head
    exchange.face = face_of_path(head)
    exchange.dry_run = EXPLAIN_PATH.match(head.path) is not None or \
        is_asked(head, "x-ccproxy-dry-run")
    record_request(app, exchange)
    if head.method == "CONNECT":
        raise ProxyError("not_implemented", "CONNECT: this is not a proxy of that kind.")
    if head.method == "OPTIONS":
        return serve_options(app, exchange)
    route = find_route(head)
    exchange.record["quiet"], exchange.private = route.quiet, route.private
    method = "GET" if head.method == "HEAD" else head.method
    if method not in route.methods:
        allowed = list(route.methods) + (["HEAD"] if "GET" in route.methods else []) + ["OPTIONS"]
        raise ProxyError("method", "%s is not for %s; use %s." % (
            printable(head.method, 20), shown_path(head), " or ".join(route.methods)),
            details={"allow": ", ".join(allowed)})
    return route.methods[method](app, exchange)


# === SERVER =================================================================
# Accepting connections, the loop of one connection, the sweep that looks at
# all deadlines, and the orderly stop: no new connections, running answers may
# finish for a while, the rest get an error event, then everything is closed.


TLS_HANDSHAKE = b"\x16\x03"     # how a ClientHello's record begins (RFC 8446 5.1)


async def read_request_head(app: App, wire: Wire, first: bool) -> Optional[RequestHead]:
    """The next request's head; None when the client left or stayed silent instead."""
    limits = app.limits
    if not wire.buffer:
        wait = limits.first_request if first else limits.keep_alive
        try:
            if not await wire.fill(time.monotonic() + wait):
                return None
        except asyncio.TimeoutError:
            return None
    deadline, seen, skipped = time.monotonic() + limits.head, 0, 0
    while True:
        if wire.buffer[:2] == TLS_HANDSHAKE:
            raise client_fault("it begins with a TLS handshake. This port speaks plain HTTP: use "
                               "http://, or put a TLS proxy in front of it.")
        while skipped < MAX_LEADING_CRLFS and wire.buffer[:2] == b"\r\n":
            del wire.buffer[:2]     # RFC 9112 2.2
            skipped += 1
        end = find_head_end(wire.buffer, seen, client_fault)
        if end >= 0:
            head = parse_request_head(bytes(wire.buffer[:end]))
            del wire.buffer[:end]
            return head
        if len(wire.buffer) > MAX_REQUEST_LINE_BYTES and b"\n" not in wire.buffer:
            raise ProxyError("target_too_long", "The request line is longer than %d bytes."
                             % MAX_REQUEST_LINE_BYTES)
        seen = len(wire.buffer)
        try:
            if not await wire.fill(deadline):
                return None
        except asyncio.TimeoutError:
            raise ProxyError("slow_client", "The head of the request did not come within "
                             "%s." % counted(limits.head, "second")) from None


async def serve_connection(app: App, wire: Wire) -> None:
    """All requests of one connection, one after another."""
    first = True
    try:
        while first or not app.draining:
            exchange = await serve_one(app, wire, first)
            if exchange is None:
                break
            if not exchange.keep or not await discard_body(app, exchange):
                await linger(app, wire)
                break
            first = False
        else:
            await linger(app, wire)     # we stop; a next request may be on its way already
    except ConnectionError:
        app.log.debug("a client left")
    finally:
        wire.close()
        app.clients -= 1


NO_HEAD = RequestHead("", "", "", 1, {}, Framing(False, 0), False)     # until one has come


def cut_short(app: App) -> Json:
    """What is recorded of a request that was given up: who ended it."""
    if app.ending and app.ending.done():
        return {"status": 503, "error": "the proxy stopped first"}
    return {"status": 499, "error": "the client left"}


async def serve_one(app: App, wire: Wire, first: bool) -> Optional[Exchange]:
    """One request and its answer, whatever goes wrong; None when no request came."""
    exchange = Exchange(wire, NO_HEAD, time.monotonic(), False)
    try:
        with app.raiser:
            head = await read_request_head(app, wire, first)
            if head is None:
                return None
            wire.fresh = False
            exchange.head, exchange.started = head, time.monotonic()
            exchange.keep = head.keep_alive and not app.leaving
            app.exchanges.add(exchange)
            await serve_request(app, exchange)
    except ProxyError as error:
        await show_error(app, exchange, error)
    except (asyncio.CancelledError, ConnectionError):
        if exchange.record:
            exchange.record.update(cut_short(app))
        raise
    finally:
        app.exchanges.discard(exchange)
        exchange.relay = None       # which knows the exchange: a cycle would wait for the collector
        release_body(app, exchange)
        keep_record(app, exchange)
        log_exchange(app, exchange)
    return exchange


def is_for_codex(fields: Fields, error: ProxyError) -> bool:
    """Whether this is a permanent refusal for Codex, which would try it thirty times (R44)."""
    named = "%s %s" % (fields.get("originator", ""), fields.get("user-agent", ""))
    permanent = error.status in (400, 402, 403, 404) or error.kind == "usage_window"
    return permanent and re.search(r"\bcodex", named, re.I) is not None


async def show_codex_error(app: App, exchange: Exchange, error: ProxyError) -> None:
    """The one form of a refusal after which Codex stops and shows the message."""
    reply = Reply("resp_" + random_hex(24), "", int(time.time()))
    code = "context_length_exceeded" if error.kind == "too_long" else "invalid_prompt"
    frame = numbered_frame(reply, "response.failed", response=response_object(
        reply, "failed", error={"code": code, "message": error.message}))
    await respond(app, exchange, 200, frame, [("content-type", "text/event-stream"),
                                              *error_fields(error)])


async def show_error(app: App, exchange: Exchange, error: ProxyError) -> None:
    """An error as the answer, in the shape of the API that the client speaks."""
    conceal_error(app, exchange, error)
    if exchange.opened:
        exchange.keep = False
        return
    face = exchange.face or CHAT
    if face is RESPONSES and is_for_codex(exchange.head.fields, error):
        await show_codex_error(app, exchange, error)
        return
    if error.status in (408, 411, 413):
        exchange.keep = False       # the rest of that body is not worth waiting for
    fields = error_fields(error) + note_fields(exchange)
    if error.kind == "method" and error.details:
        fields.append(("allow", error.details["allow"]))
    if error.kind == "upgrade":
        fields.append(("upgrade", "HTTP/1.1"))      # RFC 9110 15.5.22 wants one named
    await respond_json(app, exchange, error.status, face.error(error), fields)


def log_level_of(status: int, quiet: bool, failed: bool) -> int:
    """What went wrong on our side or behind us is a warning, what nobody cares about is debug."""
    if status >= 500 or (failed and status == 200):
        return logging.WARNING
    return logging.DEBUG if quiet and status < 400 else logging.INFO


UNLOGGED = ("asked", "reasoning", "quiet", "status", "error")   # told elsewhere or not at all


def log_exchange(app: App, exchange: Exchange) -> None:
    """One line for one request."""
    known = exchange.record
    status = known.get("status", 0)
    level = log_level_of(status, known.get("quiet", False), "error" in known)
    if known and app.log.isEnabledFor(level):
        left_out = UNLOGGED + ("method", "path") if "api" in known else UNLOGGED
        fields = {name: value for name, value in known.items() if name not in left_out}
        fields["total"] = time.monotonic() - exchange.started
        app.log.log(level, "%d %s", status, log_line({**fields, "error": known.get("error")}))


async def linger(app: App, wire: Wire) -> None:
    """Say goodbye and wait for the client's, throwing away what still comes.

    A connection closed with unread bytes sends RST, which may overtake the answer (RFC 9112 9.6).
    """
    if wire.ended or not wire.transport.can_write_eof():
        return
    deadline = time.monotonic() + app.limits.linger
    try:
        wire.transport.write_eof()
    except OSError:         # it has just gone
        return
    wire.on_data = ignore_data
    wire.release()
    try:
        while not wire.ended:
            await wire.wait(deadline)
    except asyncio.TimeoutError:
        app.log.debug("a client went on sending behind its answer")


def ignore_data(data: bytes) -> None:
    """What comes behind the last answer is nobody's."""


async def refuse(app: App, wire: Wire) -> None:
    """Let a client that was not served read why."""
    try:
        await linger(app, wire)
    finally:
        wire.close()
        app.refusals -= 1


def accept(app: App, wire: Wire) -> None:
    """A new connection: serve it, or say that there are too many."""
    if app.draining or app.clients >= app.max_clients:
        error = ProxyError("busy", "Too many connections; try again.", retry_after=1)
        body = to_json(CHAT.error(error))
        fields = [JSON_TYPE, ("content-length", str(len(body))), ("connection", "close")]
        wire.write(response_head(error.status, fields + error_fields(error)) + body)
        wire.on_data = ignore_data
        if app.refusals < MAX_REFUSALS:
            app.refusals += 1
            spawn(app, refuse(app, wire))
        else:
            wire.close()
        return
    app.clients += 1
    wire.is_client = True
    spawn(app, serve_connection(app, wire))


def look_at_each(app: App, things: List[Any], look: Callable[[Any], None],
                 end: Callable[[Any, Exception], None]) -> None:
    """Look at all of them; a fault ends the one that it befell, and the rest are looked at."""
    while things:
        with guarded(app, lambda fault: end(things.pop(), fault)):
            while things:
                look(things[-1])
                things.pop()


async def sweep(app: App) -> None:
    """Look at every deadline, again and again."""
    while True:
        await asyncio.sleep(app.limits.sweep)
        now = time.monotonic()
        look_at_each(app, list(app.wires), lambda wire: wire.expire(now), Wire.abort)
        look_at_each(app, list(app.relays), lambda relay: relay.tick(now), Relay.crash)
        for backend in (app.home, *app.vendors.values()):
            backend.pool.prune(now - app.limits.pool_idle)


async def drain(app: App, hurry: asyncio.Event) -> None:
    """Let running answers finish until the deadline or a second signal, then end the rest."""
    app.leaving = app.draining = True
    end_followers(app)
    await end_idle(app, hurry)
    await wait_for_exchanges(app, min(app.drain_within, app.config.drain_seconds), hurry)
    app.ending.set_result(None)
    look_at_each(app, list(app.relays), lambda relay: relay.give_up(stopping_error()), Relay.crash)
    for wire in list(app.wires):
        if wire.on_open is None:
            wire.abort()        # an upstream whose answer has not begun
    if not hurry.is_set():
        await wait_for_exchanges(app, 1.0, hurry)       # so that those errors are written
    tasks = list(app.tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await end_usage_log(app)
    for backend in (app.home, *app.vendors.values()):
        backend.pool.prune(float("inf"))
    if app.demo_server is not None:
        app.demo_server.close()


def idle_wires(app: App) -> List[Wire]:
    """Client connections on which no request is served."""
    busy = {exchange.wire for exchange in app.exchanges}
    return [wire for wire in app.wires if wire.is_client and wire not in busy]


async def end_idle(app: App, hurry: asyncio.Event) -> None:
    """Let idle client connections go, but those whose request is on its way: what the system has
    got already is read first, and a new connection has a moment to say what it came for.  So has
    every one in a restart: its next answer tells the client to come anew, and nobody is lost."""
    deadline = time.monotonic() + app.limits.first_grace
    for _ in range(3):          # turns: ready sockets are read, and their tasks wake
        await asyncio.sleep(0)
    for wire in idle_wires(app):
        if not (wire.fresh or wire.buffer or app.restarting):
            wire.abort()
    while idle_wires(app) and not hurry.is_set() and time.monotonic() < deadline:
        await asyncio.sleep(0.01)
    for wire in idle_wires(app):
        wire.abort()


async def wait_for_exchanges(app: App, seconds: float, hurry: asyncio.Event) -> None:
    """Wait until no request runs, the time is over, or there is a hurry."""
    deadline = time.monotonic() + seconds
    while app.exchanges and not hurry.is_set() and time.monotonic() < deadline:
        await asyncio.sleep(min(0.05, app.limits.sweep))


async def listen(app: App) -> Any:
    """Open the listening socket.  Raises OSError."""
    loop = asyncio.get_running_loop()
    app.started, app.ending = time.monotonic(), loop.create_future()
    server = await open_listener(app, app.config.host, app.config.port,
                                 lambda: Wire(app, lambda wire: accept(app, wire)), app.sockets)
    spawn(app, keep_running(app, sweep))
    spawn(app, keep_running(app, watch_alerts))
    app.listeners += [lambda record: measure_record(app.metrics, record, app.home.models, {
        name: one.vendor.models for name, one in app.vendors.items() if one.vendor}),
                      lambda record: count_record(app.minutes, record)]
    start_usage_log(app)
    if app.config.cli_version == "auto":
        app.version_task = spawn(app, keep_running(app, keep_version_fresh))
    return server


# === PART: COMMANDS =========================================================
# === DEMO UPSTREAM ==========================================================
# The upstream inside the program: a listening socket on loopback that speaks
# Command Code's format, so that --demo and the selftest go through everything
# that a real request goes through.  What it says is DEMO ANSWERS' work.


async def serve_demo_call(app: App, wire: Wire, head: RequestHead) -> None:
    """One demo request and its answer, chunk by chunk."""
    exchange = Exchange(wire, head, time.monotonic(), True)
    pieces = [piece async for piece in body_pieces(app, exchange, app.config.max_body_bytes)]
    release_body(app, exchange)
    answer = demo_answer(json.loads(b"".join(pieces)))
    if answer.status != 200:
        await respond_json(app, exchange, answer.status, answer.body,
                           [("retry-after", "7")] if answer.status == 429 else [])
        return
    fields = [("content-type", "text/event-stream"), ("transfer-encoding", "chunked"),
              ("x-trace-id", random_hex(32))]
    wire.write(response_head(200, fields))
    for pause, line in answer.lines:
        if pause:
            await asyncio.sleep(pause)
        wire.write(chunk(to_json(line) + b"\n"))
        await wire.drain()
    if answer.cut:
        wire.abort()
    else:
        wire.write(LAST_CHUNK)


async def serve_demo_connection(app: App, wire: Wire) -> None:
    """All demo requests of one connection."""
    try:
        while not wire.ended:
            head = await read_request_head(app, wire, False)
            if head is None:
                break
            await serve_demo_call(app, wire, head)
    except (ConnectionError, ProxyError) as error:
        app.log.debug("demo upstream: %s", printable(str(error), 200))
    finally:
        wire.close()


async def start_demo(app: App) -> None:
    """Listen on a free port of loopback and make that the upstream."""
    app.demo_server = await open_listener(app, "127.0.0.1", 0, lambda: Wire(
        app, lambda wire: spawn(app, serve_demo_connection(app, wire))))
    app.home.origin = Origin("http", "127.0.0.1", app.demo_server.sockets[0].getsockname()[1], "")
    app.vendors = {}                # it answers all by itself
    app.home.proxy_known = True          # loopback is never reached through a proxy
    app.home.models_due = float("inf")   # and has no list of models
    app.demo = True


# === PROCESSES ==============================================================
# One process from its start to its end: the signals that it follows, what runs
# in its loop, and how it stops.


def watch_signals(app: App) -> None:
    """SIGINT and SIGTERM: the first stops in order, the second at once; in a restart, the first
    makes it a stop.  SIGHUP opens the log file anew and reads the configuration again, SIGUSR2
    starts again."""
    loop = asyncio.get_running_loop()
    terminals = [number for number in (0, 1, 2) if os.isatty(number)]

    def received() -> None:
        if app.restarting:
            app.restarting, app.drain_within = False, float("inf")
            if app.leaving:         # else stop_taking comes, and finds a stop
                app.server.close()
        else:
            (app.hurry if app.stop.is_set() else app.stop).set()

    def reload() -> None:
        if terminals and not any(map(os.isatty, terminals)):    # closed: this is its goodbye
            received()
        else:
            reopen_log(app.log)
            reload_settings(app)

    def restart() -> None:
        spawn(app, restart_if_sound(app, "SIGUSR2"))

    actions = {"SIGINT": received, "SIGTERM": received, "SIGHUP": reload, "SIGUSR2": restart}
    for name, action in actions.items():
        if not hasattr(signal, name):
            continue                        # Windows has the first two
        number = getattr(signal, name)
        try:
            loop.add_signal_handler(number, action)
        except NotImplementedError:         # Windows
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(received))
    if hasattr(signal, "pthread_sigmask"):  # blocked before a restart
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_SIGNALS)


async def stop_taking(app: App) -> None:
    """Take no more connections: at once where the program starts again, for they can wait; else
    after drainDelaySeconds, in which /health sends those away that look at it."""
    app.leaving = True
    if app.restarting:
        app.server.pause()
        return
    delay = app.config.drain_delay_seconds
    if delay:
        app.log.info("stopping in %s", counted(delay, "second"))
        await asyncio.wait([spawn(app, app.hurry.wait())], timeout=delay)
    app.server.close()


async def run_proxy(app: App, demo: bool, announce: Callable[[str, int], None]) -> None:
    """Listen, announce the address, and serve until a signal comes.  Raises OSError when the
    address cannot be had."""
    app.stop, app.hurry = asyncio.Event(), asyncio.Event()
    raise_descriptor_limit(app)
    gc.set_threshold(*GC_THRESHOLDS)
    if demo:
        await start_demo(app)
    app.server = await listen(app)
    watch_signals(app)
    if app.watched is not None:
        spawn(app, keep_running(app, watch_files))
    host, port = app.server.sockets[0].getsockname()[:2]
    announce(host, port)
    app.log.info("started%s: ccproxy %s on http://%s:%d, process %d", " again" if app.sockets else
                 "", __version__, bracketed(host), port, os.getpid())
    await app.stop.wait()
    await stop_taking(app)
    running = len(app.exchanges) - len(app.followers)
    app.drain_within = min(app.drain_within, app.config.drain_seconds)
    words = "; new requests wait for %s at most" if app.restarting else \
        "; at most %s more (drainSeconds), a second Ctrl-C or SIGTERM ends at once"
    app.log.info("stopping: %s in progress%s", counted(running, "request"), words % counted(
        app.drain_within, "second") if running or app.restarting else "")
    await drain(app, app.hurry)
    if app.restarting:          # what is said meanwhile is for the new program
        signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)


def end_with_stdin() -> None:
    """End as SIGTERM ends when standard input does: when whoever started us is gone, in whatever
    way, and no descriptor of it is left."""
    import threading

    def watch() -> None:
        try:
            while os.read(0, KIB):
                pass
        except OSError:         # there is none
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def give_memory_back() -> None:
    """Return what compiling this file took to the system: half of what the process holds by then.
    Only glibc keeps it; elsewhere there is nothing to do."""
    if not sys.platform.startswith("linux"):
        return
    try:
        import ctypes
        ctypes.CDLL(None).malloc_trim(0)
    except (ImportError, OSError, AttributeError, MemoryError) as error:
        logging.getLogger("ccproxy").debug("memory is not given back: %s", error)


def leave(status: int) -> None:
    """End the process without the interpreter's own clean-up: a thread that still asks for the
    list of models may wake in the middle of that and crash (CPython before 3.14)."""
    flush_output()
    os._exit(status)


# === TERMINAL ===============================================================
# What the commands have in common: what each is given, and how it prints on a
# terminal, into a pipe, or where nobody reads.  Colours and progress are for a
# terminal alone; what stands in a pipe is the same text without them.

COLOURS = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}
SIGNS = {0x2713: "ok  ", 0x2717: "FAIL", 0x2026: "...", 0xb7: "-"}     # where they cannot be shown


class Invocation(NamedTuple):
    """What a command is given: its own arguments (as argparse names them; `rest` is what stands
    behind `--`), and all settings."""

    given: Any
    rest: List[str]
    settings: Settings


def program_name() -> str:
    """How this program was started, as a person can type it again."""
    import shutil
    if os.path.realpath(sys.argv[0]) != os.path.realpath(__file__):
        return "python3 ccproxy.py"
    interpreter = (getattr(sys, "orig_argv", None) or ["python3"])[0]   # from Python 3.10 on
    short = os.path.basename(interpreter)
    words = [short if shutil.which(short) else interpreter, sys.argv[0]]
    return " ".join('"%s"' % word if re.search(r"[^\w@%+=:,./\\~-]", word) else word
                    for word in words)


def given_files(given: Any) -> List[Tuple[str, str]]:
    """(flag, path) of the files that the command line names."""
    return [(flag, path) for flag, path in (
        ("--config", given.config), ("--env-file", given.env_file)) if path]


def own_command(invocation: Invocation, words: str = "") -> str:
    """A command of this program with the settings of this one, as a person can type it: its name
    and the flags that it was started with.  Secrets are left out."""
    import shlex
    given, values = invocation.given, invocation.settings.flags
    flags = ["%s=%s" % pair for pair in given_files(given)] + ["--demo"] * given.demo
    flags += ["%s=%s" % (flag_name(option), values[option.name]) for option in OPTIONS
              if option.name in values and not option.secret]
    return " ".join(filter(None, [program_name(), words, *map(shlex.quote, flags)]))


def encodable(text: str, stream: Any) -> str:
    """A text as a stream's encoding can take it: our signs in letters, the rest as `?`."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
        return text
    except UnicodeEncodeError:      # a terminal of Windows, or LANG=C
        return text.translate(SIGNS).encode(encoding, "replace").decode(encoding)


def say(text: str) -> bool:
    """Print, if standard output takes it; a full disk costs one line on standard error."""
    if sys.stdout is None:
        return False
    try:
        sys.stdout.write(encodable(text, sys.stdout))
        sys.stdout.flush()
        return True
    except OSError as error:
        sys.stdout = None       # else the interpreter complains once more at the end
        if not isinstance(error, BrokenPipeError):      # `... | head` has seen enough
            warn("ccproxy: standard output: %s\n" % error.strerror)
        return False


def complain(message: str, status: int = 2) -> None:
    """One line on standard error, and the end."""
    warn("ccproxy: %s\n" % printable(message, 1000))
    raise SystemExit(status)


def is_terminal(stream: Any) -> bool:
    try:
        return bool(stream is not None and stream.isatty())
    except ValueError:      # closed
        return False


def has_colours() -> bool:
    """Whether standard output may be painted (no-color.org; an old console of Windows may not)."""
    able = sys.platform != "win32" or "WT_SESSION" in os.environ or "TERM" in os.environ
    return able and is_terminal(sys.stdout) and not os.environ.get("NO_COLOR") and \
        os.environ.get("TERM") != "dumb"


def hear_of_children() -> None:
    """Be told when a child ends, also where whoever started us ignored that: it is inherited, and
    then every exit status is lost."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def end_by_signals() -> None:
    """From now on SIGTERM and its like end the program in order: what it holds is let go of."""
    def ended(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    for name in ("SIGTERM", "SIGHUP", "SIGQUIT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), ended)


def paint(text: str, colour: str) -> str:
    """A text in one of COLOURS ("": as it is), where that may be."""
    return "\x1b[%dm%s\x1b[0m" % (COLOURS[colour], text) if colour and has_colours() else text


def terminal_width() -> int:
    """Columns of the terminal; 0 where standard output is none, and nothing is to be cut."""
    import shutil
    return shutil.get_terminal_size((100, 24)).columns if is_terminal(sys.stdout) else 0


def show_progress(text: str) -> None:
    """What is being waited for, on one line that the next one replaces; "" takes it away.  Only on
    a terminal."""
    import shutil
    if is_terminal(sys.stderr):
        width = shutil.get_terminal_size((80, 24)).columns - 1
        sys.stderr.write(encodable("\r%s\r%s" % (text[:width].ljust(width), text[:width]),
                                   sys.stderr))
        sys.stderr.flush()


def show_feature(works: Optional[bool], name: str) -> None:
    """A line behind a tick, a cross, or a dash where neither can be said."""
    marks = {True: ("\u2713", "green"), False: ("\u2717", "red"), None: ("-", "dim")}
    mark, colour = marks[works]
    say("%s %s\n" % (paint(mark, colour), name))


def end_work(begun: Any, seconds: float) -> Any:
    """The result of work that start_work began, waited for so long.  Raises what it raises, and
    TimeoutError when it takes longer: a name server or a slow sender keeps to no timeout of a
    socket."""
    from concurrent.futures import wait
    wait([begun], seconds)
    if not begun.done():
        raise TimeoutError("no answer within " + counted(seconds, "second"))
    return begun.result()


def with_deadline(seconds: float, work: Callable[[], Any]) -> Any:
    return end_work(start_work(work), seconds)


def plain_reason(error: Exception) -> str:
    """What is wrong, in the words of the system and without urllib's around them."""
    inner = getattr(error, "reason", None)
    error = inner if isinstance(inner, Exception) else error
    return printable(str(getattr(error, "strerror", None) or error), 200) or type(error).__name__


def read_health(base: str, query: str = "") -> Optional[Json]:
    """What a ccproxy says of itself at an address: {} for another program, None for nobody."""
    import urllib.error
    origin = parse_origin(base)
    url = "http://%s:%d/health%s" % (bracketed(origin.host), origin.port, query)
    try:
        _, _, body = ask_url(url, None, 2.0, {}, direct=True)
    except (urllib.error.URLError, UnicodeError):       # of a host that no name server takes
        return None
    except OSError:
        return {}
    health = decode_anyhow(body.decode("utf-8", "replace"))
    return health if isinstance(health, dict) and "open_streams" in health else {}


UNPROVEN = ("cannot prove that it is run by this account here (it may be another account's, a "
            "container's or another machine's)")


def read_proven_health(base: str) -> Tuple[Optional[Json], bool]:
    """(what read_health gives, whether it is a proxy of this account: one that may have a key)."""
    nonce = random_hex(64)
    health = read_health(base, "?nonce=" + nonce)
    try:
        wanted = instance_proof(nonce, parse_origin(base).port) if health else ""
    except (OSError, ValueError, ProxyError) as error:
        warn("ccproxy: no instance key: %s\n" % error)
        wanted = ""
    proof = (health or {}).get("proof")
    return health, bool(wanted) and isinstance(proof, str) and is_same_secret(proof, wanted)


# === MODELS COMMAND =========================================================
# `ccproxy.py models`: the catalogue as a table, live where the upstream tells it
# within a few seconds, else built-in; what would be refused here is marked.

LIST_SECONDS = 5.0


def find_models(config: Config, demo: bool) -> Tuple[Models, str]:
    """(models, why they are the built-in ones: "" where the upstream told them)."""
    if demo or not config.use_provider_models:
        return builtin_models(), "--demo asks nobody" if demo else "useProviderModels is false"
    origin = parse_origin(config.api_base)
    show_progress("asking the upstream\u2026")
    try:
        live = with_deadline(LIST_SECONDS, lambda: fetch_models(origin, None, LIST_SECONDS))
        models = merge_live_models(live, builtin_models())
        return (models, "") if models else (
            builtin_models(), "%s gave no list of models" % origin.authority)
    except (OSError, ValueError, RecursionError) as error:
        return builtin_models(), "%s: %s" % (origin.authority, plain_reason(error))
    finally:
        show_progress("")


def model_states(models: Models, config: Config) -> List[Tuple[Model, str]]:
    """Every listed model, and what is to be said of it here: why it is not served, or that it is
    the default."""
    served, off = served_ids(models, config), switched_off(models, config)
    default = find_model(aliased("default", config), models)
    states = []
    for name in models.listed:
        chosen = "default" if default and default.id.lower() == name.lower() else ""
        states.append((models.known[name.lower()], chosen if name in served else
                       "off" if name.lower() in off else "not allowed"))
    return states


def short_efforts(efforts: Optional[Tuple[str, ...]]) -> str:
    """Efforts in words, a run of three and more as low-max; "?" where they are not known."""
    if efforts is None:
        return "?"
    at = EFFORTS.index(efforts[0]) if efforts and efforts[0] in EFFORTS else 0
    if len(efforts) > 2 and efforts == EFFORTS[at:at + len(efforts)]:
        return "%s-%s" % (efforts[0], efforts[-1])
    return " ".join(efforts)


def models_text(shown: List[Tuple[Model, str]], config: Config, why: str) -> str:
    """The table of models and their states, aliases below it, and where it is from."""
    rows = [(model.id, short_number(model.context) if model.context else "",
             short_number(model.max_output) if model.max_output else "",
             "yes" if model.vision else "", short_efforts(model.efforts),
             model.plan or "?", state) for model, state in shown]
    head, *lines = table_lines(("model", "context", "output", "vision", "efforts", "plan", ""),
                               rows, "lrrllll", terminal_width())
    lines = [paint(line, {"": "", "default": "green"}.get(state, "dim"))
             for line, (_, state) in zip(lines, shown)]
    lines += ["alias %s = %s" % pair for pair in sorted(config.model_aliases.items())]
    source = "built in, not live (%s)" % why if why else "live from " + redact(config.api_base)
    return "\n".join([paint(head, "bold"), *lines,
                      "%s, %s\n" % (counted(len(shown), "model"), source)])


def models_json(shown: List[Tuple[Model, str]], config: Config, why: str) -> str:
    return json.dumps({
        "source": "built-in" if why else "live", "reason": why or None,
        "models": [{**model_entry(model), "enabled": state != "off", "allowed": state !=
                    "not allowed", "default": state == "default"} for model, state in shown],
        "aliases": config.model_aliases}, indent=1) + "\n"


def show_models(invocation: Invocation) -> int:
    """The command `models`."""
    config = invocation.settings.config
    models, why = find_models(config, invocation.given.demo)
    write = models_json if invocation.given.json else models_text
    text = write(model_states(models, config), config, why)
    return 0 if say(text) else 1


# === USAGE COMMAND ==========================================================
# `ccproxy.py usage`: what usageDb holds, added up by model, key, day, client or
# status.  The file is only read, so it does not matter who writes to it.  Times
# are told at their median and at the 95th of a hundred.

USAGE_GROUPS = {        # the expression, and the order of its lines
    **{column: (column, "2 DESC, 1") for column in ("model", "key", "client", "status")},
    "day": ("date(at, 'unixepoch', 'localtime')", "1")}
SINCE_SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
MAX_USAGE_LINES = 200           # of the table; clients can name any number of models


# Figures of a line: the name, what SQLite makes of the requests (null where nothing was told), the
# head of its column and how that shows it, and when the column gives way on a narrow terminal (the
# lowest first; 9: never).
USAGE_FIGURES: Tuple[Tuple[str, str, str, Callable[[Any], str], int], ...] = (
    ("requests", "count(*)", "requests", str, 9),
    ("errors", "coalesce(sum(status != 499 AND (status >= 400 OR error != '')), 0)", "errors",
     str, 8),
    ("input_tokens", "coalesce(sum(input), 0)", "in", short_number, 7),
    ("output_tokens", "coalesce(sum(output), 0)", "out", short_number, 7),
    ("cached_tokens", "coalesce(sum(cached), 0)", "cached", short_number, 1),
    ("cached_share", "total(cached) / sum(input)", "share", lambda part: "%d%%" % (100 * part), 5),
    ("cost_usd", "sum(cost)", "cost $", lambda cost: "%.4f" % cost, 6),
    ("first_p50", "time_at(first, 0.5)", "first p50", short_span, 4),
    ("first_p95", "time_at(first, 0.95)", "p95", short_span, 3),
    ("total_p50", "time_at(total, 0.5)", "total p50", short_span, 2),
    ("total_p95", "time_at(total, 0.95)", "p95", short_span, 2))


class TimeAt:
    """An aggregate for SQLite: the time that this share of all does not exceed."""

    def __init__(self) -> None:
        self.times, self.share = array("d"), 0.0

    def step(self, seconds: Optional[float], share: float) -> None:
        self.share = share
        if seconds is not None:
            self.times.append(seconds)

    def finalize(self) -> Optional[float]:
        return sorted(self.times)[ceil(len(self.times) * self.share) - 1] if self.times else None


def read_since(given: str, now: float) -> float:
    """The moment that 30m, 12h, 7d, 4w or a date means.  Raises ProxyError `config`."""
    span = re.fullmatch(r"([0-9]{1,5})([mhdw])", given, re.ASCII)
    if span:
        return now - int(span[1]) * SINCE_SECONDS[span[2]]
    try:
        return time.mktime(time.strptime(given, "%Y-%m-%d"))
    except (ValueError, OverflowError):
        raise ProxyError("config", "--since must be like 30m, 12h, 7d, 4w or 2026-11-01 (it is %s)"
                         % printable(given, 40)) from None


def read_usage_file(path: str, group: str, since: float) -> List[Tuple[str, Json]]:
    """(name, figures) of each group, and last of all requests.  Raises ProxyError `config`."""
    import pathlib
    import sqlite3
    still = not (os.path.exists(path + "-wal") or os.access(os.path.dirname(path), os.W_OK))
    mode = "?immutable=1" if still else "?mode=ro"      # else SQLite wants to write beside it
    query = "SELECT %%s, %s FROM requests WHERE at >= ?%%s" % ", ".join(
        row[1] for row in USAGE_FIGURES)
    try:
        db = sqlite3.connect(pathlib.Path(path).as_uri() + mode, timeout=5.0, uri=True)
        try:
            if not check_schema(db):        # an empty file
                db.close()
                db = sqlite3.connect(":memory:")
                make_schema(db)
            db.create_aggregate("time_at", 2, TimeAt)
            db.execute("BEGIN")             # both queries are of the same moment
            name, order = USAGE_GROUPS[group]
            rows = db.execute(query % (name, " GROUP BY 1 ORDER BY " + order), (since,)).fetchall()
            rows += db.execute(query % ("'total'", ""), (since,))
        finally:
            db.close()
    except (sqlite3.Error, ValueError, TypeError) as error:
        raise ProxyError("config", "usageDb %s: %s" % (path, printable(str(error), 200))) from None
    return [(printable(str(name), 200), {
        row[0]: value and round(value, 6 if row[0] == "cost_usd" else 4)
        for row, value in zip(USAGE_FIGURES, values)}) for name, *values in rows]


def usage_table(by: str, lines: List[Tuple[str, Json]], width: int) -> List[str]:
    """Lines of the table, of which the last one is the sum of all, for a terminal so wide (0: any);
    columns give way before they are cut."""
    names = [name or "-" for name, _ in lines]
    columns = [(rank, [head, *("-" if told[figure] is None else show(told[figure])
                               for _, told in lines)])
               for figure, _, head, show, rank in USAGE_FIGURES]
    least = min(24, max(len(name) for name, _ in lines)) + 1
    for rank in range(1, 10):
        kept = [cells for own, cells in columns if own >= rank]
        if not width or least + sum(2 + max(map(len, cells)) for cells in kept) <= width:
            break
    heads, *rows = zip([by, *names], *kept)
    return table_lines(heads, rows, "l" + "r" * len(kept), width)


def usage_screen(by: str, lines: List[Tuple[str, Json]], path: str, since: float) -> str:
    """All that is printed for a person."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(since))
    *groups, whole = lines
    if not groups:
        return "no requests since %s in %s\n" % (when, path)
    more = len(groups) - MAX_USAGE_LINES
    head, *rows, total = usage_table(by, [*groups[:MAX_USAGE_LINES], whole], terminal_width())
    if more > 0:
        rows.append("(%d more: --csv and --json tell all)" % more)
    return "\n".join([paint(head, "bold"), *rows, paint(total, "bold"),
                      paint("since %s, from %s" % (when, path), "dim"), ""])


def usage_csv(by: str, lines: List[Tuple[str, Json]]) -> str:
    """The groups as CSV.  No cell begins as a formula would: clients choose their models' names."""
    import csv
    import io
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([by, *lines[-1][1]])
    for name, figures in lines[:-1]:
        safe = "'" + name if name[:1] in "=+-@|%\t\r" and name else name
        writer.writerow([safe, *figures.values()])
    return text.getvalue()


def show_usage_log(invocation: Invocation) -> int:
    """The command `usage`."""
    given, config = invocation.given, invocation.settings.config
    path, by = usage_path(config), given.by
    since = read_since(given.since, time.time())
    if given.json and given.csv:
        raise ProxyError("config", "--json or --csv, not both")
    if not path:
        raise ProxyError("config", "usageDb is not set, so no requests are kept: set it (auto will "
                         "do) and start the proxy with it")
    if not os.path.isfile(path):
        raise ProxyError("config", "usageDb: there is no file %s yet; start the proxy with it"
                         % path)
    lines = read_usage_file(path, by, since)
    if given.json:
        return 0 if say(json.dumps({
            "since": shown_moment(since), "by": by, "total": lines[-1][1],
            "groups": [{by: name, **figures} for name, figures in lines[:-1]]},
            indent=1) + "\n") else 1
    text = usage_csv(by, lines) if given.csv else usage_screen(by, lines, path, since)
    return 0 if say(text) else 1


# === DOCTOR CHECKS ==========================================================
# What can be wrong on this machine, a function a check: Python, settings, port,
# clients.  A check reads and tries, and changes nothing; what it knows for later
# ones it leaves in the scene.

EMPTY_ZSTD = b"\x28\xb5\x2f\xfd\x20\x00\x01\x00\x00"
VERSION_SECONDS = 8.0           # for `CLIENT --version`; aider takes three


class Account(NamedTuple):
    """What the upstream said of a key: a status (0: no answer), words, and what follows of it."""

    key: RingKey
    status: int
    said: str
    state: KeyState


@dataclass
class Scene:
    """What the checks are given, and what earlier ones have found."""

    settings: Settings
    origin: Origin
    proxy: Optional[Origin] = None
    proxy_authorization: str = field(default="", repr=False)
    date: str = ""                              # of the upstream's answer,
    heard: float = 0.0                          # and when it came
    models: Optional[Models] = None
    accounts: List[Account] = field(default_factory=list)


def check_python(scene: Scene) -> List[Finding]:
    """Python itself, and the modules that a build may lack."""
    try:
        import sqlite3
        database = "SQLite " + sqlite3.sqlite_version
    except ImportError:
        database = ""
    try:
        inflate_zstd(EMPTY_ZSTD, 10)
        zstd = "zstd"
    except ProxyError:
        zstd = "no zstd (requests in it get a 415)"
    words = "Python %s, %s, %s, %s" % (".".join(map(str, sys.version_info[:3])),
                                       ssl.OPENSSL_VERSION, database or "no SQLite", zstd)
    if scene.settings.config.usage_db and not database:
        return [Finding(False, words, "Unset usageDb, or use a Python with sqlite3")]
    return [Finding(True, words)]


def setting_sources(settings: Settings) -> str:
    """Where the settings come from, in words."""
    given = sorted({source.partition(" ")[2] for source in settings.sources.values()
                    if source.startswith("environment ")})
    words = ["%s of %s" % (counted(len(settings.entries), "entr", "ies"), settings.file_name)
             if settings.entries else "no config file"]
    words += [counted(len(settings.flags), "flag")] if settings.flags else []
    words += ["from the environment: " + ", ".join(given)] if given else []
    return "; ".join(words)


def check_configuration(scene: Scene) -> List[Finding]:
    """Where the configuration comes from, names that mean nothing, and secrets that lie open."""
    settings = scene.settings
    if settings.fault:
        return [Finding(False, settings.fault, "Mend it; what follows does without")]
    findings = [Finding(True, setting_sources(settings))]
    names = {name for option in OPTIONS + REMOVED_OPTIONS for name in environment_names(option)}
    strange = sorted(name for name in set(os.environ) - names
                     if name.startswith("CC_") and nearest_ids(name, tuple(names)))
    if strange:
        findings.append(Finding(None, "no option has the name " + ", ".join(strange)))
    secrets = [option.name for option in OPTIONS if option.secret
               and settings.entries.get(option.name)]
    if secrets and readable_by_others(settings.file_name):
        findings.append(Finding(False, "other accounts of this machine can read %s in %s" % (
            " and ".join(secrets), settings.file_name), "chmod 600 it"))
    return findings


def check_operator_keys(scene: Scene) -> List[Finding]:
    """The operator's keys: how many, for whom, and who can read their file."""
    operator, findings = scene.settings.operator, []
    if not operator.keys:
        return [Finding(None, "none: callers bring their own")]
    findings.append(Finding(None if scene.settings.unused else True, scene.settings.unused or (
        "%d of %s" % (len(operator.keys), operator.source))))
    if readable_by_others(operator.source):
        findings.append(Finding(False, "other accounts of this machine can read " + operator.source,
                                "chmod 600 it"))
    return findings


def check_port(scene: Scene) -> List[Finding]:
    """Whether the proxy could listen, or does already."""
    config = scene.settings.config
    host, port = config.host, config.port
    if not port:
        return [Finding(None, "0: any free one is taken at start")]
    health = read_health(local_address(host, port))
    if health:
        version = printable(str(health.get("version")), 20)
        same = "" if version == __version__ else " (this file is %s: restart it)" % __version__
        return [Finding(True, "ccproxy %s answers on %s:%d%s" % (version, host, port, same))]
    if health is not None:
        return [Finding(False, "another program holds port %d" % port,
                        "Stop that, or choose another: --port %d" % (port % 65535 + 1))]
    try:
        close_sockets(bind_sockets(host, port))
    except OSError as error:
        return [Finding(False, "cannot listen on %s port %d: %s" % (
            host, port, plain_reason(error)), "Choose another --host or --port")]
    return [Finding(True, "%d is free" % port)]


def client_version(path: str) -> Finding:
    """What `--version` of an installed client prints."""
    import subprocess
    try:
        done = subprocess.run([path, "--version"], timeout=VERSION_SECONDS,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired:
        return Finding(None, "at %s, gives no version" % path)
    except OSError as error:
        return Finding(False, "%s does not start: %s" % (path, plain_reason(error)),
                       "Install it anew")
    found = re.search(rb"[0-9]+(\.[0-9]+)+[0-9A-Za-z.+-]*", done.stdout)
    if done.returncode:
        return Finding(False, "%s --version ends with status %d" % (path, done.returncode),
                       "Install it anew")
    return Finding(True, printable(found[0].decode(), 40) if found else "at " + path)


def check_clients(scene: Scene) -> List[Finding]:
    """The clients on PATH and their versions, all asked at once."""
    import shutil
    from concurrent.futures import ThreadPoolExecutor
    places = {name: path for name in CLIENTS if (path := shutil.which(name))}
    if not places:
        return [Finding(None, "none of %s is on PATH" % ", ".join(CLIENTS))]
    with ThreadPoolExecutor(len(places)) as pool:
        return [one._replace(words="%s %s" % (name, one.words))
                for name, one in zip(places, pool.map(client_version, places.values()))]


def read_home_file(variable: str, folder: str, name: str) -> str:
    """The text of a client's own settings; "" when there are none that can be read."""
    place = os.environ.get(variable) or os.path.expanduser(folder)
    try:
        with open(os.path.join(place, name), encoding="utf-8-sig", errors="replace") as file:
            return file.read(MIB)
    except OSError:
        return ""


def check_client_settings(scene: Scene) -> List[Finding]:
    """Whether variables and files of clients send them here."""
    config = scene.settings.config

    def leads_here(url: str) -> bool:
        """Also where a ccproxy answers that was started with another port."""
        return points_here(url, config) or (
            is_loopback_address(url) and bool(read_health(url.strip())))

    findings = environment_findings(os.environ, "the environment", config, leads_here)
    text = read_home_file("CLAUDE_CONFIG_DIR", "~/.claude", "settings.json")
    try:
        inner = inner_object(json.loads(text), "env") if text else {}
        given = {name: value for name, value in inner.items() if isinstance(value, str)}
        findings += environment_findings(given, "claude's settings.json", config, leads_here)
    except (ValueError, RecursionError):
        findings.append(Finding(False, "claude's settings.json is not JSON",
                                "Mend it: claude does not read it either"))
    text = read_home_file("CODEX_HOME", "~/.codex", "config.toml")
    findings += [codex_finding(text, os.environ, config, leads_here)] if text else []
    return findings or [Finding(None, "nothing points a client here yet: see Clients in the "
                                "README")]


# === DOCTOR UPSTREAM ========================================================
# The way to the upstream, step by step, and what it says of keys and models.
# Only what is free is asked for: the list of models, and an account's figures.


def check_proxy(scene: Scene) -> List[Finding]:
    """Whether the environment sends us through an HTTP proxy."""
    way = Backend("commandcode", scene.origin, builtin_models())
    try:
        read_proxy(way)
    except ProxyError as error:
        return [Finding(False, error.message, "Name an http:// proxy, or the upstream in NO_PROXY")]
    scene.proxy, scene.proxy_authorization = way.proxy, way.proxy_authorization
    names = sorted(name for name in os.environ if name.lower() in (
        "http_proxy", "https_proxy", "all_proxy", "no_proxy") and os.environ[name])
    words = "none is used" if way.proxy is None else printable(way.proxy.authority, 100)
    return [Finding(True, words + (" (%s)" % ", ".join(names) if names else ""))]


def check_authorities(scene: Scene) -> List[Finding]:
    """Whether there are authorities to verify the upstream's certificate by."""
    if scene.origin.scheme != "https":
        return [Finding(None, "not needed: apiBase is plain HTTP")]
    kinds = {"SSL_CERT_FILE": os.path.isfile, "SSL_CERT_DIR": os.path.isdir}
    named = {name: os.environ[name] for name in kinds if os.environ.get(name)}
    lost = ["%s (%s)" % (name, path) for name, path in named.items() if not kinds[name](path)]
    if lost:
        return [Finding(False, "there is no such place: " + ", ".join(lost),
                        "Correct it, or unset it")]
    place = " of " + (" and ".join(named) or "the system")
    try:
        loaded = ssl.create_default_context().cert_store_stats()["x509_ca"]
    except OSError as error:
        return [Finding(False, "the authorities%s cannot be read: %s" % (
            place, plain_reason(error)), "It must be a PEM file")]
    folder = ssl.get_default_verify_paths().capath or ""
    hashed = re.compile(r"[0-9a-f]{8}\.[0-9]+")     # as OpenSSL looks for them, when it wants one
    if loaded:
        return [Finding(True, "%d%s" % (loaded, place))]
    if os.path.isdir(folder) and any(map(hashed.fullmatch, os.listdir(folder))):
        return [Finding(True, "in the folder " + folder)]
    return [Finding(False, "there are no certificate authorities" + place,
                    "Install ca-certificates, or name a PEM file of them in SSL_CERT_FILE")]


def has_route() -> bool:
    """Whether this machine knows a way to others.  Connecting a UDP socket sends nothing."""
    for family, address in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.connect((address, 9))
                return True
        except OSError:
            continue
    return False


def first_hop(scene: Scene) -> Origin:
    return scene.proxy or scene.origin


def check_network(scene: Scene) -> List[Finding]:
    host = first_hop(scene).host
    if LOOPBACK.fullmatch(host):
        return [Finding(None, "not needed: %s is this machine" % host)]
    if has_route():
        return [Finding(True, "there is a way out")]
    return [Finding(False, "there is no network: this machine has no way to any other",
                    "Connect it, then try again")]


def check_names(scene: Scene) -> List[Finding]:
    """DNS of the first host on the way."""
    first = first_hop(scene)
    try:
        found = socket.getaddrinfo(first.host, first.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        # Without a network some systems say the same as of a name that does not exist.
        return [Finding(False, "no network, or none whose DNS knows %s: %s" % (
            printable(first.host, 100), plain_reason(error)), "Check the connection, and " + (
                "apiBase" if scene.proxy is None else "HTTPS_PROXY and HTTP_PROXY"))]
    addresses = list(dict.fromkeys(entry[4][0] for entry in found))
    return [Finding(True, "%s is %s" % (first.host, ", ".join(addresses[:4])))]


def shake_hands(scene: Scene, context: ssl.SSLContext) -> bytes:
    """The upstream's certificate after a TLS handshake, perhaps through the proxy.  Raises
    OSError."""
    import http.client
    first, origin = first_hop(scene), scene.origin
    connection = http.client.HTTPSConnection(
        first.host, first.port, context=context,
        timeout=scene.settings.config.upstream_connect_seconds)
    if scene.proxy is not None:
        connection.set_tunnel(origin.host, origin.port, {
            "Proxy-Authorization": scene.proxy_authorization} if scene.proxy_authorization else {})
    try:
        connection.connect()
        return connection.sock.getpeercert(True) or b""
    except http.client.HTTPException as error:
        raise OSError("malformed HTTP: %s" % type(error).__name__) from None
    finally:
        connection.close()


def check_tls(scene: Scene) -> List[Finding]:
    """The TLS handshake, and who issued the certificate, also of one that is not trusted."""
    if scene.origin.scheme != "https":
        return [Finding(None, "not used: apiBase is plain HTTP")]
    try:
        der = shake_hands(scene, ssl.create_default_context())
        return [certificate_finding(read_certificate(der), time.time())]
    except ssl.SSLCertVerificationError as error:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE     # to name it only
        shown = read_certificate(shake_hands(scene, context))
        return [Finding(False, "the certificate is not trusted: %s (issued by %s)" % (
            printable(error.verify_message, 200), shown.issuer), VERIFY_ADVICE.get(
                error.verify_code, COMPANY_ADVICE))]
    except ssl.SSLError as error:
        return [Finding(False, "the TLS handshake failed: %s" % plain_reason(error),
                        "Something in between may speak no TLS: check apiBase and the proxy")]
    except OSError as error:
        return [Finding(False, "no connection to %s: %s" % (
            scene.origin.authority, plain_reason(error)), "Check firewall and proxy settings")]


def ask_upstream(scene: Scene, path: str, key: str = "",
                 seconds: float = 10.0) -> Tuple[int, bytes]:
    """(status, body) of a GET to the upstream; its Date is kept.  Raises OSError."""
    origin, config = scene.origin, scene.settings.config
    fields = {"accept": "application/json"}
    if key:
        fields.update({"authorization": "Bearer " + key, "x-cli-environment": "production",
                       "x-command-code-version": DEFAULT_CLI_VERSION if config.cli_version == "auto"
                       else config.cli_version})
    status, told, body = ask_url("%s://%s%s%s" % (
        origin.scheme, origin.authority, origin.base, path), None, seconds, fields)
    scene.date, scene.heard = told.get("date", scene.date), time.time()
    return status, body


def check_upstream(scene: Scene) -> List[Finding]:
    """Whether the upstream answers, without a key."""
    began = time.monotonic()
    try:
        status, body = ask_upstream(scene, "/provider/v1/models")
    except OSError as error:
        return [Finding(False, "%s does not answer: %s" % (
            scene.origin.authority, plain_reason(error)), "Try again later; check apiBase")]
    spent = time.monotonic() - began
    live = decode_anyhow(body.decode("utf-8", "replace")) if status == 200 else None
    scene.models = merge_live_models(live, builtin_models())
    if scene.models is None:
        return [Finding(False, "%s answers %d, not with its list of models" % (
            scene.origin.authority, status), "Check apiBase; a proxy or firewall may answer")]
    return [Finding(True, "%s answers within %d ms" % (scene.origin.authority, spent * 1000))]


def check_clock(scene: Scene) -> List[Finding]:
    if not scene.date:
        return [Finding(None, "not known: no answer of the upstream told the time")]
    return [clock_finding(scene.date, scene.heard)]


# === DOCTOR =================================================================
# `ccproxy.py doctor`: what the upstream says of keys, accounts and models; and
# all checks in their order, a line or more each, exit status 0 when nothing is
# wrong.  What needs something that failed is not tried, so that one cause gives
# one cross.

MAX_ASKED_KEYS = 32
NEW_KEY = "Make a new one at commandcode.ai, settings, API keys"


def own_key_findings(settings: Settings, given: str) -> List[Finding]:
    """What is to be said of COMMANDCODE_KEY where it holds something else than a key."""
    kind = mistaken_key(given)
    if kind and given != settings.config.client_key:
        return [Finding(False, "%s is no Command Code key but %s" % (KEY_VARIABLE, kind),
                        "Set it to your own (commandcode.ai, settings, API keys)")]
    if given and not KEY_PATTERN.search(given):
        return [Finding(None, KEY_VARIABLE + " is no Command Code key (user_...); whether it is a "
                        "proxy's clientKey, only that proxy can tell")]
    return []


def ask_about(scene: Scene, key: RingKey) -> Account:
    """What the upstream says of a key, as ACCOUNTS asks it."""
    whoami, *paths = ACCOUNT_PATHS
    state = KeyState()
    try:
        status, body = ask_upstream(scene, whoami, key.key)
        org = read_org(json.loads(body)) if status == 200 else ""
        note_key_check(state, status, time.time())
        if status == 200:
            query = "?orgId=" + org if org else ""
            told = [ask_upstream(scene, path + query, key.key) for path in paths]
            state.figures = read_figures(*(json.loads(body) if known == 200 else None
                                           for known, body in told), time.time())
        return Account(key, status, "the upstream answers %d" % status, state)
    except (OSError, ValueError, RecursionError) as error:
        return Account(key, 0, plain_reason(error), state)


def key_finding(account: Account) -> Finding:
    """Whether a key was accepted, and what else keeps its account from being used."""
    shown = key_words(account.key)
    known = account_state(account.key, account.state, Routing(), time.time())
    if known.word == "refused":
        return Finding(False, "%s is refused (%d)" % (shown, account.status), NEW_KEY)
    if account.status == 200:
        why = ", but " + UNFIT_WORDS[known.reason] if known.reason else ""
        return Finding(True, "%s is accepted%s" % (shown, why))
    return Finding(False, "%s is %s: %s" % (shown, known.word, account.said), "Try again later")


def check_keys(scene: Scene) -> List[Finding]:
    """Each key of the environment and of the operator, asked about a few at a time."""
    from concurrent.futures import ThreadPoolExecutor
    notes: List[str] = []
    given = os.environ.get(KEY_VARIABLE, "").strip()
    try:
        own = () if mistaken_key(given) else parse_ring(given, KEY_VARIABLE, notes)
    except ProxyError as error:
        return [Finding(False, error.message, "Mend COMMANDCODE_KEY")]
    findings = own_key_findings(scene.settings, given)
    keys = tuple({key.digest: key for key in (*own, *scene.settings.operator.keys)}.values())
    if not keys:
        return findings or [
            Finding(None, "none is set: export COMMANDCODE_KEY=user_... to have one tried")]
    with ThreadPoolExecutor(8) as pool:
        scene.accounts = list(pool.map(lambda key: ask_about(scene, key), keys[:MAX_ASKED_KEYS]))
    findings += [key_finding(account) for account in scene.accounts]
    findings += [Finding(None, note.partition("=")[2]) for note in notes]
    if len(keys) > MAX_ASKED_KEYS:
        findings.append(Finding(None, "%d more were not tried" % (len(keys) - MAX_ASKED_KEYS)))
    return findings


def figures_findings(finding: Callable[[str, Figures, float], Finding], nothing: str,
                     scene: Scene) -> List[Finding]:
    """A finding for each account of which there are figures."""
    return [finding(key_words(one.key), one.state.figures, time.time())
            for one in scene.accounts if one.state.figures] or [Finding(None, nothing)]


def check_models(scene: Scene) -> List[Finding]:
    """How many models there are, and whether the default is one that is served here."""
    config, models = scene.settings.config, scene.models or builtin_models()
    words = "%d%s" % (len(models.listed), "" if scene.models else " built in")
    try:
        default = resolve_model("", models, config, [])
    except ProxyError as error:
        return [Finding(False, "%s; defaultModel: %s" % (words, error.message),
                        "Choose another defaultModel")]
    if default.id not in models.listed:
        near = nearest_ids(default.id, tuple(models.listed))
        return [Finding(False, "%s; defaultModel %s is not one of them" % (words, default.id),
                        "Choose another" + (", such as %s" % ", ".join(near) if near else ""))]
    return [Finding(True, "%s; defaultModel is %s" % (words, default.id))]


class Check(NamedTuple):
    """One row: what is checked, how, what it needs, and the seconds that it may take."""

    name: str
    run: Callable[[Scene], List[Finding]]
    needs: Tuple[str, ...] = ()
    seconds: float = 15.0


DOCTOR_CHECKS = (
    Check("python", check_python), Check("configuration", check_configuration),
    Check("operator keys", check_operator_keys), Check("port", check_port),
    Check("proxy", check_proxy), Check("authorities", check_authorities),
    Check("network", check_network, ("proxy",)), Check("names", check_names, ("network",), 10.0),
    Check("tls", check_tls, ("names", "authorities"), 25.0),
    Check("upstream", check_upstream, ("tls",), 12.0), Check("clock", check_clock),
    Check("keys", check_keys, ("upstream",), 40.0),
    Check("plan", partial(figures_findings, plan_finding, "no plan is known"), ("upstream",)),
    Check("windows", partial(figures_findings, window_finding, "no usage windows are known"),
          ("upstream",)),
    Check("models", check_models), Check("clients", check_clients),
    Check("client settings", check_client_settings))


def run_check(check: Check, scene: Scene) -> List[Finding]:
    """What a check finds; that it takes too long, or cannot be made, is a finding too."""
    try:
        return list(with_deadline(check.seconds, lambda: check.run(scene)))
    except (OSError, ValueError, RecursionError, ProxyError) as error:
        return [Finding(False, plain_reason(error), "Try again")]


def run_checks(scene: Scene, checks: Tuple[Check, ...] = ()) -> Iterator[Tuple[Check, Finding]]:
    """Make all checks, and give each finding as it comes."""
    failed: Dict[str, str] = {}         # name of a check -> of the one that is the cause
    for check in checks or DOCTOR_CHECKS:
        cause = next((failed[name] for name in check.needs if name in failed), None)
        show_progress("checking: %s\u2026" % check.name)
        findings = run_check(check, scene) if cause is None else [
            *(own_key_findings(scene.settings, os.environ.get(KEY_VARIABLE, "").strip())
              if check.name == "keys" else ()),
            Finding(None, "not tried: see %s" % cause)]
        show_progress("")
        if cause is not None or any(finding.works is False for finding in findings):
            failed[check.name] = cause or check.name
        secrets = [one.key.key for one in scene.accounts]
        for finding in findings:
            yield check, finding._replace(words=redact(finding.words, secrets),
                                          advice=redact(finding.advice, secrets))


def run_doctor(invocation: Invocation, checks: Tuple[Check, ...] = ()) -> int:
    """The command `doctor`."""
    settings = invocation.settings
    rows: List[Json] = []
    scene = Scene(settings, parse_origin(settings.config.api_base))
    for check, finding in run_checks(scene, checks):
        rows.append({"check": check.name, **finding._asdict()})
        if not invocation.given.json:
            advice = ". %s." % finding.advice if finding.advice else ""
            show_feature(finding.works, "%-16s%s%s" % (check.name, finding.words, advice))
    sound = all(row["works"] is not False for row in rows)
    said = not invocation.given.json or say(json.dumps(
        {"sound": sound, "version": __version__, "checks": rows}, indent=1) + "\n")
    return 0 if sound and said else 1


# === TOP ====================================================================
# `ccproxy.py top`: /admin/state as a table, drawn anew every second on a terminal,
# else printed once.  The proxy may be any version's, or no ccproxy at all: nothing
# is taken for granted, and only printable ASCII of a text reaches the terminal.

TOP_SECONDS = 4.5               # within which the proxy must answer; nothing is shown until then
TOP_MINUTES = 5                 # that the summary adds up
WHOLE_WIDTH, SNAPSHOT_LINES = 10_000, 60    # where there is no terminal
ALTERNATE, ORDINARY = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"    # screen and cursor


def number_in(entry: Json, name: str) -> float:
    """A number that was told, 0 where none was."""
    value = entry.get(name)
    return value if isinstance(value, (int, float)) and 0 <= value < 1e11 else 0


def text_in(entry: Json, name: str, show: Callable[[float], str] = str) -> str:
    """A text that was told, or a number as `show` shows it; "" where none was."""
    value = entry.get(name)
    if isinstance(value, str):
        return printable(value, 200)
    return "" if value is None else show(number_in(entry, name))


def clock_time(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


# Columns: the head, the side, the least width of a terminal that has room for it, the member that
# it shows, and how, if that is a number.
TopColumns = Tuple[Tuple[str, str, int, str, Callable[[float], str]], ...]
LIVE_COLUMNS: TopColumns = (
    ("running", "r", 0, "seconds", short_span), ("phase", "l", 0, "phase", str),
    ("chars", "r", 40, "output_chars", short_number), ("model", "l", 0, "model", str),
    ("client", "l", 60, "client", str), ("api", "l", 80, "api", str), ("key", "l", 80, "key", str))
RECENT_COLUMNS: TopColumns = (
    ("last", "l", 0, "at", clock_time), ("status", "r", 0, "status", str),
    ("model", "l", 0, "model", str), ("client", "l", 60, "client", str),
    ("api", "l", 120, "api", str), ("key", "l", 120, "key", str),
    ("in", "r", 70, "input", short_number), ("cached", "r", 90, "cached", short_number),
    ("out", "r", 50, "output", short_number), ("first", "r", 80, "first", short_span),
    ("total", "r", 40, "total", short_span), ("error", "l", 60, "error", str))


def colour_of(entry: Json) -> str:
    """How a request is shown: "" as it is."""
    status = number_in(entry, "status")
    return "dim" if status == 499 else "red" if status >= 400 or entry.get("error") else ""


def top_table(columns: TopColumns, entries: List[Json], width: int) -> List[Tuple[str, str]]:
    """(line, colour) of a table of the columns that there is room for, an empty line above it."""
    heads, sides, _, names, shows = zip(*(one for one in columns if width >= one[2]))
    named = [{**one, "model": one.get("model") or one.get("asked")} for one in entries]
    rows = [tuple(map(text_in, [one] * len(names), names, shows)) for one in named]
    head, *lines = table_lines(heads, rows, "".join(sides), width)
    return [("", ""), (head, "bold"), *zip(lines, map(colour_of, entries))]


def fill_lines(words: List[str], width: int) -> List[str]:
    """Words in as few lines as they fit in."""
    import textwrap
    text = "  ".join(word.replace(" ", "\xa0") for word in words)     # a line ends between words
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines]


def summary_words(state: Json) -> List[str]:
    """What runs, and the last minutes added up."""
    since = time.time() - 60 * TOP_MINUTES
    last = [one for one in objects_in(state.get("minutes")) if number_in(one, "at") > since]

    def added(name: str) -> float:
        return sum(number_in(one, name) for one in last)

    words = [counted(number_in(state, "open_streams"), "open stream"),
             counted(number_in(state, "clients"), "client"),
             "%d min: %s requests" % (TOP_MINUTES, short_number(added("requests"))),
             short_number(added("errors")) + " errors", short_number(added("input")) + " in",
             short_number(added("output")) + " out"]
    if added("input"):
        words.append("%d%% cached" % (100 * min(added("cached") / added("input"), 1)))
    timed = [one for one in last if one.get("first_p50") is not None]
    if timed:
        words.append("first event %s, p95 %s" % (text_in(timed[-1], "first_p50", short_span),
                                                 text_in(timed[-1], "first_p95", short_span)))
    return words


def alert_line(alert: Json) -> str:
    """An alert as the log tells it; one that is not known here by its members."""
    key, name, kind = (text_in(alert, member) for member in ("key", "name", "kind"))
    value, limit = number_in(alert, "value"), number_in(alert, "limit")
    if kind in ALERT_RULES:
        return "alert: " + alert_text(Alert(key, name, kind, value, limit, 0.0), "")
    return "alert: %s %s is %.2f (%.2f)" % (name or key, kind, value, limit)


def screen_lines(state: Json, address: str, trouble: str, width: int, height: int) -> List[str]:
    """The whole screen: at most `height` lines of at most `width` columns.  `trouble`: why the
    proxy does not answer now."""
    words = ["ccproxy " + text_in(state, "version"), text_in(state, "status"),
             "up " + text_in(state, "uptime_seconds", short_span), address,
             "upstream " + text_in(object_in(state, "upstream"), "address")]
    lines = [(line, "bold") for line in fill_lines(words, width)]
    lines += [(line, "") for line in fill_lines(summary_words(state), width)]
    lines += [(alert_line(alert), "yellow") for alert in objects_in(state.get("alerts"))[:3]]
    lines += [(trouble, "red")] if trouble else []
    room = max(height - len(lines) - 4, 2)      # for both tables without their heads
    live, recent = objects_in(state.get("live")), objects_in(state.get("recent"))
    live = live[:max(room // 2, room - len(recent))]
    lines += top_table(LIVE_COLUMNS, live, width)
    lines += top_table(RECENT_COLUMNS, recent[:max(room - len(live), 0)], width)
    return [paint(cut_text(line, width), colour) for line, colour in lines[:height]]


def lend_key(key: str, base: str, named: bool) -> str:
    """The key, for a proxy that --url named or that is this account's.  Raises ProxyError."""
    if key and not named and not read_proven_health(base)[1]:
        raise ProxyError("permission", "it asks for a key but %s: no key was sent. Add --url %s to "
                         "send it." % (UNPROVEN, base))
    return key


def top_address(url: Optional[str], config: Config) -> str:
    """Where the proxy is: at --url, else where clients of this machine reach it.  Raises ProxyError
    `config`."""
    if not url and not config.port:
        raise ProxyError("config", "port 0 is a different one at every start: give --port")
    try:
        origin = parse_origin(url or local_address(config.host, config.port))
    except ValueError as error:
        raise ProxyError("config", "--url: %s" % error) from None
    return "%s://%s%s" % (origin.scheme, origin.authority, origin.base)


def read_state(address: str, secret: Callable[[], str]) -> Json:
    """What the proxy tells of itself; the secret is shown only to one that asks for it.  Raises
    OSError, and ProxyError for a refusal and for what no ccproxy says."""
    url = address + "/admin/state"
    status, _, body = ask_url(url, None, TOP_SECONDS, {})
    if status == 401:
        shown = {"authorization": "Bearer " + secret()}
        status, _, body = ask_url(url, None, TOP_SECONDS, shown)
    told = decode_anyhow(body.decode("utf-8", "replace"))
    if status == 200 and isinstance(told, dict) and {"version", "live"} <= told.keys():
        return told
    reason = inner_object(told, "error").get("message") if status != 404 else ""
    raise ProxyError("permission", "status %d: %s" % (
        status, reason or "that is no ccproxy, or too old a one"))


def follow_state(address: str, secret: Callable[[], str], state: Json) -> int:
    """Draw the state every second on the terminal's other screen until Ctrl-C, however often the
    proxy goes and comes back; gives the exit status."""
    import shutil
    end_by_signals()
    if sys.platform == "win32":
        os.system("")           # makes its console understand what follows
    since = trouble = ""
    say(ALTERNATE)
    try:
        while True:
            lines = screen_lines(state, address, trouble, *shutil.get_terminal_size((80, 24)))
            if not say("\x1b[H" + "\n".join(line + "\x1b[K" for line in lines) + "\x1b[J"):
                return 1
            time.sleep(1.0)
            try:
                state, since, trouble = read_state(address, secret), "", ""
            except (OSError, ValueError, ProxyError) as error:
                since = since or clock_time(time.time())
                trouble = "no answer since %s (%s), asking again every second" % (
                    since, plain_reason(error))
    except KeyboardInterrupt:
        return 0
    finally:
        say(ORDINARY)


def show_top(invocation: Invocation) -> int:
    """The command `top`."""
    config, given = invocation.settings.config, invocation.given
    address, key = top_address(given.url, config), config.admin_key or config.client_key
    secret = partial(lend_key, key, address, bool(given.url))
    os.environ["no_proxy"] = "*"        # HTTP_PROXY is for the upstream: it must not get the key
    try:
        state = read_state(address, secret)
    except ProxyError as error:
        complain("%s: %s" % (address, error.message), 1)
    except (OSError, ValueError) as error:
        complain("no ccproxy answers at %s (%s): start it, or say where it is with --url" % (
            address, plain_reason(error)), 1)
    width = terminal_width()
    if width and not given.once and os.environ.get("TERM") != "dumb":
        return follow_state(address, secret, state)
    lines = screen_lines(state, address, "", width or WHOLE_WIDTH, SNAPSHOT_LINES)
    return int(not say("\n".join(lines) + "\n"))


# === SERVICE ================================================================
# `ccproxy.py service`: the steps of SERVICE UNITS carried out, or shown.  Flags
# given to `install` become part of the service, settings of the environment do
# not: they are named, for the service will not see them.

SERVICE_SECONDS = 20.0      # for the service to answer; a slow machine takes four
SYSTEM_PLACES = ("/etc/systemd/system", "/etc/ccproxy/environment")
ENDED_STATES = ("failed", "dead", "auto-restart")       # of a systemd unit
OUTER_VARIABLES = CREDENTIAL_VARIABLES + (
    "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


def service_manager() -> str:
    return {"win32": "windows", "darwin": "launchd"}.get(sys.platform, "systemd")


def absolute_path(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def service_flags(settings: Settings) -> List[str]:
    """The flags that the service is to have.  Raises ProxyError for one that is a secret."""
    words = []
    for option in OPTIONS:
        value = settings.flags.get(option.name)
        if value is None:
            continue
        if option.secret or KEY_LIKE.search(value):
            raise ProxyError("config", "%s: a secret does not go into a service's file, which "
                             "others may read: put it into config.json (mode 0600)"
                             % flag_name(option))
        if option.name in PATH_OPTIONS and value and value != "auto":
            value = absolute_path(value)
        words.append("%s=%s" % (flag_name(option), value))
    return words


def user_folder(variable: str, default: str, *names: str) -> str:
    return os.path.join(os.environ.get(variable) or os.path.expanduser(default), *names)


def written_folders(settings: Settings) -> Tuple[str, ...]:
    """Folders in which the configuration lets the proxy write."""
    config = settings.config
    database = config.usage_db if config.usage_db != "auto" else usage_path(config)
    paths = [config.log_file, database]
    if config.admin_key:        # then /admin changes these two, by a new file beside the old
        paths += [settings.path, config.credentials_file]
    return tuple(sorted({os.path.dirname(os.path.realpath(path)) for path in paths if path}))


def enter_account() -> str:
    """A system unit's line about its account: this program's owner, or for root's one that systemd
    makes.  From now on paths count as they do there."""
    import pwd
    owner = pwd.getpwuid(os.stat(__file__).st_uid)
    os.environ.update(HOME=owner.pw_dir, XDG_STATE_HOME="/var/lib")
    return "User=" + owner.pw_name if owner.pw_uid else "DynamicUser=yes"


def enter_service(settings: Settings, environment_file: str) -> Settings:
    """The settings as the service will have them: from now on this process has its variables, those
    of its own file, in place of this shell's.  Raises ProxyError `config`."""
    names = {*CREDENTIAL_VARIABLES, *(name for one in OPTIONS for name in environment_names(one))}
    own = parse_env_file((read_file(environment_file) or b"").decode("utf-8", "replace"),
                         environment_file)
    set_environment({**{name: value for name, value in os.environ.items() if name not in names},
                     **own})
    return read_settings(settings.flags, settings.given, settings.env_file)


def describe_service(invocation: Invocation, manager: str) -> Service:
    """What is to be installed, by the settings and the command line."""
    given, settings = invocation.given, invocation.settings
    command = [sys.executable, os.path.abspath(__file__)]
    for flag, path in given_files(given):
        command += [flag, absolute_path(path)]
    command += ["--demo"] if given.demo else []
    account = enter_account() if given.system else ""
    folders = {"systemd": user_folder("XDG_CONFIG_HOME", "~/.config", "systemd", "user"),
               "launchd": os.path.expanduser("~/Library/LaunchAgents"), "windows": ""}
    folder, environment_file = SYSTEM_PLACES if given.system else (
        folders[manager], user_folder("XDG_CONFIG_HOME", "~/.config", "ccproxy", "environment"))
    if given.action == "install":
        settings = enter_service(settings, environment_file)
    config = settings.config
    return Service(
        (*command, *service_flags(settings)), folder, environment_file,
        written_folders(settings), config.drain_seconds + config.drain_delay_seconds,
        os.path.expanduser("~/Library/Logs/ccproxy.log"), getattr(os, "getuid", int)(),
        local_address(config.host, config.port) if config.port and manager != "windows" else "",
        account)


def unseen_variables(settings: Settings) -> List[str]:
    """Variables that count now and that the service will not have."""
    names = {source.partition(" ")[2] for source in settings.sources.values()
             if source.startswith("environment ")}
    names.update(name for name in os.environ if name.upper() in OUTER_VARIABLES
                 and os.environ[name])
    return sorted(names.difference(os.environ.get(FROM_ENV_FILE, "").split()))


def replace_own(old: Optional[bytes], new: Optional[bytes], path: str) -> Optional[bytes]:
    """`new` in place of a service's file.  Raises ProxyError for one that is another's."""
    if old is not None and SERVICE_MARK.encode() not in old:
        raise ProxyError("config", "%s was not written by ccproxy: move it away first" % path)
    return new


def write_step(step: Step) -> int:
    """Write a service's file, at once or not at all, and say what became of it."""
    path, data = step.words[0], step.text.encode("utf-8")
    before = change_file(path, lambda old: replace_own(old, data, path),
                         None if os.path.exists(path) else 0o644, folder_mode=0o777)
    changed = "unchanged" if before == data else "written" if before is None else "replaced"
    say("%s: %s\n" % (changed, path))
    return 0


def remove_step(step: Step) -> int:
    path = step.words[0]
    known = os.path.exists(path)
    if known:
        change_file(path, lambda old: replace_own(old, None, path))
    say(("removed: %s\n" if known else "there is no %s\n") % path)
    return 0


def run_step(step: Step) -> int:
    """Run a command of the service manager with our own terminal; its exit status."""
    import subprocess
    try:
        return subprocess.call(list(step.words),
                               stderr=subprocess.DEVNULL if step.tolerant else None)
    except KeyboardInterrupt:       # out of `logs -- -f`
        return 130


STEP_KINDS: Dict[str, Callable[[Step], int]] = {
    "write": write_step, "remove": remove_step, "run": run_step,
    "tell": lambda step: 0 if say(step.text + "\n") else 1}


def run_steps(steps: List[Step]) -> int:
    """Carry out steps until one fails; the exit status."""
    for step in steps:
        status = STEP_KINDS[step.kind](step)
        if status and not step.tolerant:
            return status
    return 0


def ask_manager(step: Step) -> str:
    """What a command of the service manager prints; "" where there is none."""
    import subprocess
    try:
        return subprocess.run(step.words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL).stdout.decode("utf-8", "replace").strip()
    except OSError:
        return ""


def unit_property(service: Service, name: str) -> str:
    return ask_manager(manager_step(service, "systemctl", "show", "--property=" + name, "--value",
                                    SERVICE_NAME + ".service"))


def lacks_namespaces(service: Service) -> bool:
    """Whether the service did not start because the kernel refuses namespaces to users."""
    return unit_property(service, "ExecMainStatus") in map(str, NO_NAMESPACES)


def lacks_bus(service: Service) -> bool:
    """Whether systemctl --user has no way to the user's manager: that tells of any unit."""
    return service_manager() == "systemd" and not (
        service.account or unit_property(service, "LoadState"))


def carry_out(invocation: Invocation, service: Service, steps: List[Step]) -> int:
    """Carry out steps until one fails, and say where that is for want of a bus; the exit status."""
    status = run_steps(steps)
    if status and lacks_bus(service):
        warn("ccproxy: this login has no bus of systemd's user manager (su and sudo give none): "
             "log in as this user, or take a unit of the system: sudo %s\n" % own_command(
                 invocation, "service %s --system" % invocation.given.action))
    return status


def first_error(service: Service, since: float, length: int) -> str:
    """The first line about an error in the journal, or on macOS in what its file grew by."""
    told = ask_manager(Step("run", (
        "journalctl", "--no-pager", "--output=cat", "--since=@%d" % since,
        "_PID=" + (unit_property(service, "ExecMainPID") or "0"))))
    told += (read_file(service.log_file) or b"")[length:].decode("utf-8", "replace")
    found = re.search("(?m)^ccproxy: .*|.* ERROR .*|.*Error:.*|.*can't open.*", told)
    line = found[0] if found else (told.strip() or "there is no line of it").splitlines()[-1]
    return printable(re.sub("^ccproxy: ", "", line), 500)


def await_service(service: Service, began: float) -> bool:
    """Whether a service that was started since then answers in time.  A ccproxy that has been on
    its port for longer is another one."""
    if not service.base:
        return True
    state, deadline = "", time.time() + SERVICE_SECONDS
    say("waiting for it on %s\n" % service.base)
    while time.time() < deadline and state not in ENDED_STATES:
        health, state = read_health(service.base), unit_property(service, "SubState")
        if health and (not state or health.get("uptime_seconds", 0) < time.time() - began):
            say("it answers\n")
            return True
        time.sleep(0.2)
    return False


def check_manager(steps: List[Step]) -> None:
    """Do nothing by halves where the service manager is missing.  Raises ProxyError."""
    import shutil
    for step in steps:
        if step.kind == "run" and not shutil.which(step.words[0]):
            raise ProxyError("config", "there is no %s on this system (--dry-run shows what it "
                             "would be asked)" % step.words[0])


def start_service(invocation: Invocation, service: Service, steps: List[Step]) -> int:
    """Install and start; under systemd without namespaces where there are none to be had."""
    import contextlib
    for folder in service.writes:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    if not service.account:
        with contextlib.suppress(OSError, ValueError, ProxyError):
            read_instance_key()         # which a user's service may read, but not make
    status = carry_out(invocation, service, steps)
    if status and service_manager() == "systemd" and lacks_namespaces(service):
        say("this system gives users no namespaces: installed without %s\n"
            % " ".join(NAMESPACE_RULES))
        plain = steps[0]._replace(text=unit_text(service, namespaces=False))
        return run_steps([plain, *steps[1:]])
    return status


def install_service(invocation: Invocation, service: Service, steps: List[Step]) -> int:
    """Install, start and see it answer, or show why it does not; the exit status."""
    began, length = time.time(), len(read_file(service.log_file) or b"")
    status = start_service(invocation, service, steps)
    if (status and lacks_bus(service)) or (not status and await_service(service, began)):
        return status
    warn("ccproxy: the service does not run: %s\n(It stays installed: `service logs` tells more, "
         "`service restart` tries again.)\n" % first_error(service, began, length))
    return status or 1


def run_service(invocation: Invocation) -> int:
    """The command `service`."""
    given, manager = invocation.given, service_manager()
    changes = not given.dry_run and given.action in ("install", "uninstall", "restart")
    if given.system and (manager != "systemd" or (changes and os.geteuid())):
        raise ProxyError("config", "--system needs systemd and root: sudo " + own_command(
            invocation, "service %s --system" % given.action))
    unseen = unseen_variables(invocation.settings) if given.action == "install" else []
    service = describe_service(invocation, manager)
    steps = SERVICE_MANAGERS[manager](service, given.action, tuple(invocation.rest))
    if given.dry_run:
        steps += [Step("wait", (service.base,))] * bool(service.base and given.action == "install")
        status = 0 if say("".join(map(step_text, steps))) else 1
    else:
        check_manager(steps)
        work = install_service if given.action == "install" else carry_out
        status = work(invocation, service, steps)
    if unseen:
        place = "as NAME=value lines into %s (mode 0600)" % service.environment_file \
            if manager == "systemd" else "into config.json"
        say("the service will not see these variables; put what it needs %s: %s\n" % (
            place, ", ".join(unseen)))
    return status


# === SELFTEST ===============================================================
# This program against its own demo upstream, over real sockets and with nothing
# but Python: what it promises to do as tables, a line of output per feature, exit
# status 0 when all work.

PIXEL = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5E"
         "rkJggg==")
WEATHER: Json = {"type": "object", "properties": {"city": {"type": "string"}},
                 "required": ["city"]}
WEATHER_TOOL: Json = {"name": "get_weather", "description": "Weather of a city."}
WEATHER_FORMAT: Json = {"name": "weather", "schema": WEATHER, "strict": True}
SELFTEST_PATHS = {"chat": "/v1/chat/completions", "messages": "/v1/messages",
                  "responses": "/v1/responses"}
SELFTEST_PICTURES: Dict[str, Json] = {
    "chat": {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PIXEL}},
    "messages": {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                             "data": PIXEL}},
    "responses": {"type": "input_image", "image_url": "data:image/png;base64," + PIXEL}}
SELFTEST_MEMBERS: Dict[str, Dict[str, Json]] = {     # of the request, by feature and API
    "tool calls": {
        "chat": {"tools": [{"type": "function",
                            "function": {**WEATHER_TOOL, "parameters": WEATHER}}]},
        "messages": {"tools": [{**WEATHER_TOOL, "input_schema": WEATHER}]},
        "responses": {"tools": [{"type": "function", **WEATHER_TOOL, "parameters": WEATHER}]}},
    "thinking": {
        "chat": {"reasoning_effort": "high"},
        "messages": {"thinking": {"type": "enabled", "budget_tokens": 4000}},
        "responses": {"reasoning": {"effort": "high", "summary": "auto"}}},
    "usage": {"chat": {"stream_options": {"include_usage": True}}},
    "structured output": {
        "chat": {"response_format": {"type": "json_schema", "json_schema": WEATHER_FORMAT}},
        "messages": {"output_config": {"format": {"type": "json_schema", "schema": WEATHER}}},
        "responses": {"text": {"format": {"type": "json_schema", **WEATHER_FORMAT}}}}}


class Trial(NamedTuple):
    """A request, and the answer that it must have: its status, and a pattern that is found in its
    fields, its text put together, or its body."""

    path: str
    body: Optional[Json]            # None: GET
    pattern: str
    status: int = 200
    fields: Mapping[str, str] = {}


def selftest_body(api: str, feature: str, words: str, stream: bool = False) -> Json:
    """A request of an API with a text and what the feature needs."""
    text = {"type": "input_text" if api == "responses" else "text", "text": words}
    content = [text, SELFTEST_PICTURES[api]] if feature == "pictures" else [text]
    return {"input" if api == "responses" else "messages": [{"role": "user", "content": content}],
            **({"max_tokens": 1000} if api == "messages" else {}),
            **SELFTEST_MEMBERS.get(feature, {}).get(api, {}), "stream": stream}


# Of every API: the feature, and its requests: what one says, what its answer holds, and the
# statuses of a streaming and of a plain one.
FEATURES: Tuple[Tuple[str, Tuple[Tuple[str, str, int, int], ...]], ...] = (
    ("text and unicode", (("Say hello.", "Grüße, 世界 🚀", 200, 200),)),
    ("tool calls", (("Call the tool. [demo:call get_weather]", "get_weather.*city", 200, 200),)),
    ("thinking", (("Think.", "thinks a little[.]", 200, 200),)),
    ("pictures", (("What is this?", "It holds 1 picture[.]", 200, 200),)),
    ("usage", (("Count.", '"(completion|output)_tokens": ?[1-9]', 200, 200),)),
    ("cut by length", (("Go on. [demo:length]",
                        'reason": ?"(length|max_tokens|max_output_tokens)"', 200, 200),)),
    # Errors before any output are real statuses, and permanent ones say so.
    ("refusals (402, 429)", (("Hello. [demo:402]", "x-should-retry: false", 402, 402),
                             ("Hello. [demo:429]", "retry-after: 7", 429, 429))),
    # An upstream that breaks off is an error and the last frame, never a made-up end.
    ("a broken upstream", (("Hello. [demo:error]", r"Broken off[^\n]*\s*\Z", 200, 503),)),
    ("structured output", (("Answer in JSON.", r'\\"city\\":', 200, 200),)))

PLAIN_FEATURES: Tuple[Tuple[str, Tuple[Trial, ...]], ...] = (
    ("model lists in both shapes", (
        Trial("/v1/models", None, '"object": ?"list"'),
        Trial("/v1/models", None, '"has_more": ?false', fields={"anthropic-version": "2023-06-01"}),
        Trial("/v1/models/moonshotai%2FKimi-K3", None, '"id": ?"moonshotai/Kimi-K3"'))),
    ("token counting", (
        Trial("/v1/messages/count_tokens", selftest_body("messages", "pictures", "How many?"),
              r'"input_tokens": ?\d\d'),)),
    ("stop sequences", (
        Trial("/v1/messages", {**selftest_body("messages", "", "Stop early."),
                               "stop_sequences": ["demo of"]},
              '"text": ?"This is the ".*"stop_sequence": ?"demo of"'),)),
    ("dry run", (
        Trial("/explain/v1/chat/completions", {**selftest_body("chat", "", "hi"), "seed": 1},
              r'\A(?!.*%s).*"notes": ?\[[^\]]*seed' % re.escape(DEMO_KEY)),)),
    ("demo without a key", (
        Trial("/health", None, '"status": ?"ok"'),
        Trial("/v1/chat/completions", selftest_body("chat", "", "hi"), "",
              fields={"authorization": ""}))))

TEXT_MEMBERS = re.compile(
    r'"(?:content|text|delta|arguments|partial_json|thinking|reasoning_content)": ?'
    r'("(?:[^"\\]|\\.)*")')


def answers_as_wanted(port: int, trial: Trial) -> bool:
    """Try a request over a connection of its own (blocking)."""
    import urllib.error
    fields = {"authorization": "Bearer " + DEMO_KEY, "content-type": "application/json"}
    try:
        status, told, data = ask_url(
            "http://127.0.0.1:%d%s" % (port, trial.path), None, 20.0, {**fields, **trial.fields},
            None if trial.body is None else to_json(trial.body), direct=True)
        body = data.decode()
        for frame in re.findall("^data: ({.*)", body, re.M) or [body]:
            json.loads(frame)
    except (OSError, ValueError) as error:
        inner = error.args[0] if isinstance(error, urllib.error.URLError) else error
        sys.stderr.write("%s: %s: %s\n" % (trial.path, type(inner).__name__, inner))
        return False
    head = "\n".join(map(": ".join, told.items()))
    text = "".join(json.loads(found) for found in TEXT_MEMBERS.findall(body))
    found = re.search(trial.pattern, "\n".join([head, text, body]), re.S)
    return status == trial.status and found is not None


def selftest_trials() -> Iterator[Tuple[str, Iterable[Trial]]]:
    """(feature, its trials), in order."""
    for api, path in SELFTEST_PATHS.items():
        for name, asked in FEATURES:
            for stream in (True, False):
                yield "%s: %s, %s" % (api, name, "streaming" if stream else "plain"), [
                    Trial(path, selftest_body(api, name, words, stream), pattern,
                          streaming if stream else plain)
                    for words, pattern, streaming, plain in asked]
    yield from PLAIN_FEATURES


def run_features(port: int) -> bool:
    """Try every feature and print a line for each; whether all work."""
    failed = 0
    for name, trials in selftest_trials():
        works = all(answers_as_wanted(port, trial) for trial in trials)
        failed += not works
        show_feature(works, name)
    say("%d failed\n" % failed if failed else "all features work\n")
    return not failed


async def selftest(app: App) -> bool:
    """Start the demo upstream and a proxy on free ports and try every feature."""
    await start_demo(app)
    server = await listen(app)
    port = server.sockets[0].getsockname()[1]
    try:
        return bool(await in_thread(lambda: run_features(port)))
    finally:
        server.close()
        await drain(app, asyncio.Event())


# === A PROXY AT HAND ========================================================
# For commands that need one: where it is, what key it wants, and one of their own
# where none runs.  That one ends with whoever started it, however that ends.

KEY_SOURCES = (KEY_VARIABLE, "COMMANDCODE_API_KEY")
OWN_PROXY = {"host": "127.0.0.1", "port": "0", "drainSeconds": "1", "drainDelaySeconds": "0"}
START_SECONDS = 60.0            # a quarter of one is common


def cli_login() -> Tuple[str, str]:
    """(file, key) of the login of the vendor's own CLI on this machine; ("", "") for none."""
    for name in CLI_FILES:
        try:
            keys = read_credentials([read_credentials_file(os.path.expanduser(name))])[1]
        except ProxyError:          # mostly that there is no such file
            continue
        if keys:
            return name, keys[0].key
    return "", ""


def no_key_words(invocation: Invocation, path: str) -> str:
    """What to do where no key is set; `path` is where the vendor's CLI keeps its login."""
    words = "set %s (export %s=user_..., or a proxy's clientKey)" % (KEY_VARIABLE, KEY_VARIABLE)
    if not path:
        return "no key: %s%s." % (words, "" if invocation.given.url else ", or try it with --demo")
    client = getattr(invocation.given, "client", "")
    return "Command Code's own CLI is logged in on this machine (%s). To use it: %s; or %s." \
        % (path, own_command(invocation, ("run " + client if client else "doctor --generate")
                             + " --operator-keys loopback"), words)


def ask_key(invocation: Invocation) -> str:
    """The key as a person types it, unseen, or that of the vendor's CLI where the person agrees.
    Ends the program where nobody is there to ask."""
    path, key = ("", "") if invocation.given.url else cli_login()
    if not is_terminal(sys.stdin):
        complain(no_key_words(invocation, path))
    if path:
        warn("Command Code's own CLI is logged in on this machine (%s). Use its key %s? [Y/n] " % (
            path, key_name(key)))
        if re.fullmatch("(y|yes)?\n", sys.stdin.readline().lower()):
            return key
    import getpass
    try:
        return getpass.getpass("Command Code key (user_..., neither shown nor stored): ").strip()
    except (EOFError, KeyboardInterrupt):
        complain("no key was given.", 130)
        return ""


def lent_key(invocation: Invocation) -> str:
    """What the proxy that is meant takes in place of a key, as far as these settings tell: the
    clientKey, a mere word where it asks for no key, "" for nothing."""
    operator = invocation.settings.operator
    if invocation.given.demo:
        return NO_KEY
    lends = bool(operator.keys) and operator.loopback and not invocation.given.url
    return operator.client_key or NO_KEY * lends


def key_fault(invocation: Invocation, key: str) -> str:
    """What is wrong with a key by its form, "" where only its proxy can tell: of another host's
    proxy it may be the clientKey."""
    kind = mistaken_key(key)
    if not kind and not re.fullmatch("[ -~]*", key):
        return "%s holds a character that no header takes: set it again." % KEY_VARIABLE
    if not kind or key == lent_key(invocation) or (
            invocation.given.url and not PLACEHOLDER.fullmatch(key)):
        return ""
    return "%s holds no Command Code key (user_...) but %s: set it to your own (commandcode.ai, " \
        "settings, API keys)." % (KEY_VARIABLE, kind)


def find_key(invocation: Invocation) -> str:
    """The key that the client is to send: the person's own, else what the proxy takes instead."""
    own = "" if invocation.given.demo else next(filter(None, (
        os.environ.get(name, "").strip() for name in KEY_SOURCES)), "")
    key = own or lent_key(invocation) or ask_key(invocation)
    fault = key_fault(invocation, key)
    if fault:
        complain(fault)
    return key


def is_served_here(invocation: Invocation, key: str) -> bool:
    """Whether a proxy of these settings has a key for a caller who sends this one."""
    lent = key == lent_key(invocation) and bool(invocation.settings.operator.keys)
    return lent or invocation.given.demo or bool(parse_ring(key, KEY_VARIABLE))


def proxy_base(invocation: Invocation) -> str:
    """The address of the proxy that is meant: --url's, else where the settings say.  Raises
    ProxyError `config`."""
    return re.sub("/v1$", "", top_address(invocation.given.url, invocation.settings.config))


def find_proxy(invocation: Invocation, key: str) -> str:
    """The address of --url's proxy, else of a running one of this account that would do just what
    one of these settings does, or "".  (Where they know nothing of the key: of any, for it may be
    its clientKey.)  Ends the program where one of our own would have no use for the key."""
    settings, demo = invocation.settings, invocation.given.demo
    config = settings.config
    if invocation.given.url:
        return proxy_base(invocation)
    base = local_address(config.host, config.port)
    health, proven = read_proven_health(base) if config.port else (None, False)
    wanted = {"status": "ok", "version": __version__,
              "upstream": "demo" if demo else configured_upstream(config)}
    served = is_served_here(invocation, key)
    if served:
        wanted["operator_keys"] = len(settings.operator.keys)
    if wanted.items() <= (health or {}).items():
        if demo or proven:          # the demo is sent no key
            return base
        warn("ccproxy: the ccproxy on %s %s, so it gets no key. To use it, add --url %s\n" % (
            base, UNPROVEN, base))
    if not served:
        complain("the key is no Command Code key (user_...), and no proxy of this account runs "
                 "here that could take it as its clientKey: name one with --url.")
    return ""


def own_proxy_command(invocation: Invocation) -> Tuple[List[str], Dict[str, str]]:
    """How a proxy of these settings is started on a free port of loopback.  Flags go by way of the
    environment: other accounts can read a command line, and one may be a secret."""
    settings = invocation.settings
    command = [sys.executable, os.path.abspath(__file__), "--while-stdin"]
    command += ["--demo"] if invocation.given.demo else []
    for flag, path in given_files(invocation.given):
        command += [flag, os.path.abspath(path)]
    flags = {**settings.flags, **OWN_PROXY}
    removed = {name for option in REMOVED_OPTIONS for name in environment_names(option)}
    kept = {name: value for name, value in os.environ.items() if name not in removed}
    return command, {**kept, **{environment_names(option)[0]: flags[option.name]
                                for option in OPTIONS if option.name in flags}}


def start_proxy(invocation: Invocation, log: Any) -> Tuple[Any, str]:
    """(process, address) of a proxy that ends when its standard input does: with us, however we
    end.  In a session of its own, for a terminal's Ctrl-C is the client's."""
    import subprocess
    command, environment = own_proxy_command(invocation)
    apart: Json = {"creationflags": 0x200} if sys.platform == "win32" else {
        "start_new_session": True}
    show_progress("starting a proxy \u2026")
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=log, **apart)
    told = ""
    try:
        line = with_deadline(START_SECONDS, process.stdout.readline)        # type: ignore
    except TimeoutError as error:
        line, told = b"", str(error)
    found = re.search(rb" on (http://\S+)", line)
    show_progress("")
    if found is None:
        process.kill()
        process.wait()
        told = " ".join(log_faults(log, "")[-3:]) or told
        complain("the proxy did not start: " + re.sub("^ccproxy: ", "", told), 1)
        return process, ""
    return process, found[1].decode()


def log_faults(log: Any, mark: str) -> List[str]:
    """The lines of a proxy's log that hold this."""
    log.seek(0)
    lines = log.read(MIB).decode("utf-8", "replace").splitlines()
    return [line for line in lines if line.strip() and mark in line]


def end_proxy(process: Any, log: Any) -> None:
    """End a proxy of our own, and tell what went wrong with it: the client had the screen."""
    import subprocess
    status = process.poll()
    process.stdin.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()
    faults = log_faults(log, " ERROR ") if status is None else log_faults(log, "")
    if status is not None:
        faults.append("the proxy ended before the client, with status %d" % status)
    for line in faults[-5:]:
        sys.stderr.write("ccproxy: %s\n" % printable(line, 1000))


# === BEFORE A CLIENT STARTS =================================================
# The upstream and the key are asked about: where one of them is at fault, most
# clients try again for minutes without a word.

AHEAD_SECONDS = 4.5             # in all; half of one is common.  Then the client starts anyway
STEP_SECONDS = 3.0              # for DNS, for a connection, for an answer


def find_way_fault(scene: Scene, names: Iterable[str]) -> Optional[Finding]:
    """The first thing that the doctor's checks of these names find wrong."""
    found = (finding._replace(words="%s: %s" % (check.name, finding.words))
             for check in DOCTOR_CHECKS if check.name in names
             for finding in run_check(check._replace(seconds=STEP_SECONDS), scene))
    return next((finding for finding in found if finding.works is False), None)


def ask_with_key(scene: Scene, key: RingKey) -> Finding:
    """Whether the upstream can be reached and accepts a key, by one question.  Raises OSError."""
    import urllib.error
    host = scene.origin.authority
    try:
        status, _ = ask_upstream(scene, ACCOUNT_PATHS[0], key.key, STEP_SECONDS)
    except urllib.error.URLError as error:
        certificate = isinstance(error.reason, ssl.SSLError)
        return (certificate and find_way_fault(scene, ("authorities", "tls"))) or Finding(
            False, "no connection to %s: %s" % (host, plain_reason(error)),
            "Check the network and apiBase")
    if status == 401:
        return Finding(False, "%s is refused (401)" % key_words(key), NEW_KEY)
    return Finding(True if status == 200 else None, "%s answers %d to a question about %s" % (
        host, status, key_words(key)))


def ask_with_keys(scene: Scene, keys: Iterable[RingKey]) -> Finding:
    """The same for several keys, of which one will do.  Raises OSError."""
    found = find_way_fault(scene, ("proxy", "network", "names"))
    for key in keys if found is None else ():
        found = ask_with_key(scene, key)
        if found.advice != NEW_KEY:
            break
    return found or Finding(True, "")


def judge_usage(base: str, status: int, answer: Json) -> Optional[Finding]:
    """What a proxy's /v1/usage says of the key that asks; None where the upstream is silent."""
    rows = answer.get("keys")
    if status != 200 or not isinstance(rows, list):
        told = inner_object(answer, "error").get("message", "is it a ccproxy?")
        return Finding(False if status in (401, 403) else None, "%s answers %d: %s" % (
            base, status, told), "Set %s to a key that it takes" % KEY_VARIABLE)
    states = {str(row.get("state")) for row in rows if isinstance(row, dict)}
    if states == {"refused"}:
        return Finding(False, "the upstream refused the key (401)", NEW_KEY)
    return None if states <= {"refused", "unknown"} else Finding(True, "")


def ask_proxy(base: str, key: str) -> Optional[Finding]:
    """Whether a proxy takes the key, and the upstream took it; None where the upstream is silent.
    Raises OSError, ValueError."""
    import urllib.error
    origin = parse_origin(base)
    context = ssl.create_default_context() if origin.scheme == "https" else None
    try:
        status, _, body = ask_url(base + "/v1/usage", context, STEP_SECONDS, {
            "authorization": "Bearer " + key}, direct=bool(LOOPBACK.fullmatch(origin.host)))
    except urllib.error.URLError as error:
        return Finding(False, "no proxy answers on %s: %s" % (base, plain_reason(error)),
                       "Start it, or correct --url")
    answer = json.loads(body)
    return judge_usage(base, status, answer if isinstance(answer, dict) else {})


def look_ahead(invocation: Invocation, base: str, key: str) -> Finding:
    """Whether a client has a chance: asked through the proxy where one runs already, and of the
    upstream where that does not tell and is this account's.  Raises OSError, ValueError."""
    settings = invocation.settings
    if invocation.given.demo:
        return Finding(True, "")
    found = ask_proxy(base, key) if base else None
    if found is None and not invocation.given.url:
        scene = Scene(settings, parse_origin(settings.config.api_base))
        found = ask_with_keys(scene, parse_ring(key, KEY_VARIABLE) or settings.operator.keys)
    return found or Finding(True, "")


def end_check(begun: Any, name: str) -> None:
    """Tell what was found, and end the program where the client has no chance."""
    show_progress("asking about the key \u2026")
    try:
        finding = end_work(begun, AHEAD_SECONDS)
    except (OSError, ValueError, RecursionError, ProxyError) as error:
        finding = Finding(None, "whether the key works is not known: " + plain_reason(error))
    show_progress("")
    if finding.works is False:
        complain("%s. %s." % (finding.words.rstrip("."), finding.advice), 1)
    if finding.works is None:
        warn("ccproxy: warning: %s; %s starts all the same.\n" % (printable(
            finding.words, 400), name))


# === TRIAL ANSWER ===========================================================
# `doctor --generate`: one short answer, asked for as a client does, with the key
# at hand and through the proxy that runs or one of our own.

TRIAL_SECONDS = 120.0
TRIAL_PATH = "/v1/chat/completions"
TRIAL_BODY = json.dumps({       # room for some thinking, which comes before the first word
    "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 512,
    "messages": [{"role": "user", "content": "Reply with the word OK only."}]})


def read_stream(answer: Any, began: float) -> Json:
    """What a streamed answer told, and when its first token came."""
    seen: Json = {}
    for line in answer:
        told = json.loads(line[6:]) if line.startswith(b"data: {") else {}
        seen.update(told)
        for choice in told.get("choices", ()):
            if choice["delta"].get("content") or choice["delta"].get("reasoning_content"):
                seen.setdefault("first", time.monotonic() - began)
            seen["whole"] = choice["finish_reason"]
    return seen if seen.get("whole") or "error" in seen else {
        "error": {"message": "the answer stopped before its end"}}


def send_trial(base: str, path: str, key: str) -> Json:
    """The answer to TRIAL_BODY, its `status`, the seconds `spent`.  Raises OSError, ValueError."""
    import http.client
    origin, began = parse_origin(base), time.monotonic()
    kind = http.client.HTTPSConnection if origin.scheme == "https" else http.client.HTTPConnection
    connection = kind(origin.host, origin.port, timeout=TRIAL_SECONDS)
    try:
        connection.request("POST", origin.base + path, TRIAL_BODY, {
            "content-type": "application/json", "authorization": "Bearer " + key})
        answer = connection.getresponse()
        seen = read_stream(answer, began) if answer.status == 200 and path == TRIAL_PATH \
            else json.loads(answer.read(MIB))
        return {**seen, "status": answer.status, "spent": time.monotonic() - began}
    except (http.client.HTTPException, LookupError, TypeError, AttributeError) as error:
        raise OSError("malformed answer: %s" % type(error).__name__) from None
    finally:
        connection.close()


def try_answer(base: str, key: str, tolerant: bool, scene: Scene) -> List[Finding]:
    """What became of one short answer.  What /explain refuses, the proxy refuses; an error behind
    that is the upstream's own word, but where there was no connection or no answer in time."""
    explained = send_trial(base, "/explain" + TRIAL_PATH, key)
    seen = explained if "error" in explained else send_trial(base, TRIAL_PATH, key)
    words = "%d from %s" % (seen["status"], base)
    if "error" in seen:
        message = printable(str(seen["error"].get("message")), 300).rstrip(".")
        passed = tolerant and seen is not explained and seen["status"] != 504 and \
            not message.startswith("No connection")
        words += ", an error of the upstream: " if passed else ": "
        return [Finding(passed, words + message, "See Errors in the README" * (not passed))]
    usage, spent = seen.get("usage", {}), seen["spent"]
    return [Finding(True, "%s, model %s, %s tokens in, %s out, first token after %s, all after %s"
                    % (words, seen.get("model"), usage.get("prompt_tokens"), usage.get(
                        "completion_tokens"), short_span(seen.get("first", spent)),
                       short_span(spent)))]


def forgive(check: Check) -> Check:
    """A check by which an upstream that answers with an error is no fault of this machine's."""
    return check._replace(run=lambda scene: [
        finding._replace(works=finding.works or None) for finding in check.run(scene)])


def examine(invocation: Invocation) -> int:
    """The command `doctor`, with one short answer where it is asked for."""
    import contextlib
    import tempfile
    given, switch = invocation.given, os.environ.get("SMOKE_ACCEPT_UPSTREAM_ERRORS", "")
    if invocation.settings.fault or not (given.generate or given.accept_upstream_errors):
        return run_doctor(invocation)       # which tells the fault
    tolerant = given.accept_upstream_errors or BOOLEAN_WORDS.get(switch.lower(), False)
    key = find_key(invocation)
    base = find_proxy(invocation, key)
    with contextlib.ExitStack() as held:
        if not base:
            log = held.enter_context(tempfile.TemporaryFile("a+b"))
            process, base = start_proxy(invocation, log)
            held.callback(end_proxy, process, log)
        trial = Check("answer", partial(try_answer, base, key, tolerant),
                      () if given.demo or given.url else ("tls",), TRIAL_SECONDS)
        return run_doctor(invocation, tuple(
            forgive(check) if tolerant and check.name in ("upstream", "keys") else check
            for check in DOCTOR_CHECKS) + (trial,))


# === LAUNCHERS ==============================================================
# `env` prints what a client needs to come here; `run` starts the client so, with
# a proxy of its own where none runs yet.

TERMINAL_SIGNALS = ("SIGINT", "SIGQUIT", "SIGBREAK")    # a terminal sends them to the client too
PASSED_SIGNALS = TERMINAL_SIGNALS + ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


def target_of(invocation: Invocation, base: str, key: str) -> Target:
    """Where a client is to be led.  Raises ProxyError for a model that is not served."""
    config, models = invocation.settings.config, builtin_models()
    model = resolve_model(invocation.given.model or "default", models, config, [])
    return Target(base, key, model, tuple(one for one in listed_models(models, config)
                                          if one.id != model.id), program=program_name())


def warn_of_key(invocation: Invocation) -> None:
    """Tell where COMMANDCODE_KEY, to which `env` and `setup` refer, holds no key, or is not set
    while the vendor's CLI has a login."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    path = "" if key or invocation.given.url or lent_key(invocation) else cli_login()[0]
    told = no_key_words(invocation, path) if path else key_fault(invocation, key)
    if told:
        warn("ccproxy: %s\n" % told)


def show_environment(invocation: Invocation) -> int:
    """The command `env`."""
    import shlex
    given = invocation.given
    target = target_of(invocation, proxy_base(invocation), KEY_MARK)
    flags = {"model": given.model, "url": given.url}
    again = own_command(invocation, " ".join(["env", given.client, *(
        "--%s=%s" % (name, shlex.quote(value)) for name, value in flags.items() if value)]))
    warn_of_key(invocation)
    shell = SHELLS[given.shell or shell_of(os.environ, sys.platform == "win32")]
    lines = environment_lines(given.client, target._replace(models=(), again=again), shell,
                              os.environ)
    return 0 if say("".join(line + "\n" for line in lines)) else 1


def client_environment(client: Client, target: Target) -> Dict[str, str]:
    """Our own environment, led here, without what leads elsewhere and without the secrets of
    whoever runs the proxy."""
    secrets = {name for option in OPTIONS if option.secret     # other programs want vendors' keys
               for name in environment_names(option)[:1 if option.lent else None]}
    secrets.update(set(CREDENTIAL_VARIABLES) - set(KEY_SOURCES))
    gone = secrets.union(foreign_names(client, os.environ))
    kept = {name: value for name, value in os.environ.items() if name not in gone}
    return {**kept, **without_detour(kept), **client.environment(target)}


def llm_home() -> str:
    """Where llm keeps its logs, keys and templates (click.get_app_dir)."""
    places = {"win32": os.environ.get("APPDATA") or "~",
              "darwin": "~/Library/Application Support"}
    usual = places.get(sys.platform) or os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return os.environ.get("LLM_USER_PATH") or os.path.join(
        os.path.expanduser(usual), "io.datasette.llm")


def fill_folder(client: Client, target: Target) -> None:
    """Write a client's files into its temporary folder.  llm wants all it has in that one folder:
    the rest of its own is linked in, its logs even before there are any."""
    files = client.files(target)
    for name, text in files.items():
        with open(os.path.join(target.folder, name), "w", encoding="utf-8") as file:
            file.write(text)
    if client.home == "LLM_USER_PATH":
        home = os.path.abspath(llm_home())
        try:
            for name in {"logs.db", *os.listdir(home)}.difference(files):
                os.symlink(os.path.join(home, name), os.path.join(target.folder, name))
        except OSError:     # there is none; or Windows, without the right to: as a new one
            pass


def holds_terminal() -> bool:
    """Whether a terminal's keys reach us, and with us the client (on Windows always)."""
    if not hasattr(os, "tcgetpgrp"):
        return True
    try:
        with open("/dev/tty", "rb", buffering=0) as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def await_client(process: Any) -> int:
    """The client's exit status, 128 + n where signal n ended it.  A client that is stopped
    (Ctrl-Z) stops us too: the shell waits for us."""
    if not hasattr(os, "WUNTRACED"):
        return int(process.wait())
    while True:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            break
        if holds_terminal():
            os.kill(os.getpid(), signal.SIGSTOP)
    process.returncode = os.waitstatus_to_exitcode(status)
    return 128 - process.returncode if process.returncode < 0 else process.returncode


def run_to_end(command: List[str], environment: Dict[str, str]) -> int:
    """Run the client with our terminal and pass on the signals that reach us alone."""
    import subprocess
    running: List[Any] = []
    early: List[int] = []

    def pass_on(number: int, frame: Any) -> None:
        if not running:
            early.append(number)
        elif signal.Signals(number).name not in TERMINAL_SIGNALS or not holds_terminal():
            running[0].send_signal(number)

    for name in PASSED_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), pass_on)
    if hasattr(signal, "SIGTSTP"):      # Ctrl-Z: we stop when the client has, see await_client
        signal.signal(signal.SIGTSTP, lambda number, frame: None)
    try:
        running.append(subprocess.Popen(command, env=environment))
    except OSError as error:
        complain("%s cannot be started: %s" % (command[0], error.strerror), 126)
    for number in early:
        running[0].send_signal(number)
    return await_client(running[0])


def run_client(invocation: Invocation) -> int:
    """The command `run`."""
    import contextlib
    import shutil
    import tempfile
    name, demo = invocation.given.client, invocation.given.demo
    client, program = CLIENTS[name], shutil.which(name)
    if program is None:
        complain("%s is not installed; its package is %s." % (name, client.package), 127)
    hear_of_children()
    key = find_key(invocation)
    target = target_of(invocation, "", key)
    end_by_signals()
    base = find_proxy(invocation, key)
    with contextlib.ExitStack() as held, contextlib.suppress(KeyboardInterrupt):    # at the start
        checked = start_work(partial(look_ahead, invocation, base, key))
        if not base:
            log = held.enter_context(tempfile.TemporaryFile("a+b"))
            process, base = start_proxy(invocation, log)
            held.callback(end_proxy, process, log)
        end_check(checked, name)
        target = target._replace(base=base)
        if client.files(target):
            target = target._replace(folder=held.enter_context(
                tempfile.TemporaryDirectory(prefix="ccproxy-")))
            fill_folder(client, target)
        if is_terminal(sys.stderr):
            sys.stderr.write("%s by way of ccproxy on %s, model %s%s\n" % (
                name, base, target.model.id, "" if demo or invocation.settings.config.upstream
                != "alpha" else "; the vendor objects to it, see the README"))
        return run_to_end([str(program), *client.arguments(target), *invocation.rest],
                          client_environment(client, target))
    return 130


# === SETUP ==================================================================
# `setup` writes into a client's own settings what leads it here, and takes it
# out again.  The file as it was is kept beside it until then.

BACKUP_ENDING = ".ccproxy-backup"
NO_FILE = b"ccproxy setup: there was no file\n"     # in place of a backup


def settings_file(name: str) -> str:
    """Where a client keeps its settings; what a link stands for, so that it stays one."""
    set_up = SET_UPS[name]
    if name == "opencode" and os.environ.get("OPENCODE_CONFIG"):
        return os.path.realpath(os.environ["OPENCODE_CONFIG"])
    named = os.environ.get(set_up.variable)
    folder = os.path.join(named, set_up.inside) if named else set_up.home
    paths = [os.path.realpath(os.path.join(os.path.expanduser(folder), one))
             for one in set_up.files]
    return next((one for ending in (BACKUP_ENDING, "") for one in reversed(paths)
                 if os.path.exists(one + ending)), paths[0])        # what was set up stays so


def decode_settings(data: Optional[bytes], path: str) -> Tuple[str, str]:
    """(byte order mark, text).  Raises ProxyError `config`."""
    try:
        text = (data or b"").decode("utf-8")
    except UnicodeDecodeError:
        raise ProxyError("config", "%s: is not UTF-8" % path) from None
    return ("\ufeff", text[1:]) if text.startswith("\ufeff") else ("", text)


def show_next_steps(invocation: Invocation, name: str, path: str, target: Target) -> None:
    """What is left to do, and what would undo it."""
    show_feature(True, "%s: %s is led to %s, model %s" % (path, name, target.base,
                                                          target.model.id))
    proxy = "another host's" if invocation.given.url else own_command(invocation)
    key = "x (any word)" if invocation.given.demo else "user_... (or a clientKey)"
    say("  The key: export %s=%s where %s runs; it is in no file.\n"
        "  The proxy: %s\n  Undo: %s\n" % (KEY_VARIABLE, key, name, proxy, own_command(
            invocation, "setup %s --undo" % name)))
    warn_of_key(invocation)
    wins = [one for one in foreign_names(CLIENTS[name], os.environ) if one not in CLAUDE_NAMES]
    if wins and name == "claude":
        say("  Unset what wins over it here: %s\n" % " ".join(wins))


def undo_setup(name: str, path: str, dry: bool) -> int:
    """Bring a client's settings back to what they were, but for what others changed since."""
    set_up, backup = SET_UPS[name], path + BACKUP_ENDING

    def restore(now: Optional[bytes]) -> Optional[bytes]:
        kept = read_file(backup)
        if kept is None:
            complain("%s: nothing was set up here (there is no %s)." % (
                path, os.path.basename(backup)), 1)
        before = b"" if kept == NO_FILE else kept or b""
        earlier = decode_settings(before, path)[1]
        mark, text = decode_settings(now, path)
        restored = before if now is None else (mark + set_up.restore(
            text, earlier, set_up.paths(set_up.load(earlier, path)), path)).encode()
        return None if restored == b"" and kept == NO_FILE else restored

    restore(read_file(path))
    if dry:
        say("%s: would be as before\n" % path)
        return 0
    mode = None if os.path.exists(path) else os.stat(backup).st_mode & 0o777
    change_file(path, restore, mode, after=lambda: os.unlink(backup))
    show_feature(True, "%s: as it was before" % path)
    return 0


def set_up_client(invocation: Invocation) -> int:
    """The command `setup`."""
    name, dry = invocation.given.client, invocation.given.dry_run
    path, set_up, windows = settings_file(name), SET_UPS[name], sys.platform == "win32"
    if invocation.given.undo:
        return undo_setup(name, path, dry)
    target = target_of(invocation, proxy_base(invocation), NO_KEY if lent_key(invocation) == NO_KEY
                       else KEY_MARK)._replace(models=())

    def edit(old: Optional[bytes]) -> bytes:
        mark, text = decode_settings(old, path)
        entries = set_up.entries(set_up.load(text, path), target, windows)
        new = (mark + set_up.edit(text, entries, path)).encode()
        if dry:
            say("%s:\n%s" % (path, "".join("  %s\n" % line for line in change_lines(entries))))
        elif new != old and not os.path.exists(path + BACKUP_ENDING):
            like = None if old is None else os.stat(path)
            replace_file(path + BACKUP_ENDING, NO_FILE if old is None else old, like,
                         like.st_mode & 0o777 if like else 0o600)
        return new

    try:
        edit(read_file(path)) if dry else change_file(path, edit, folder_mode=0o777)
    except ProxyError as error:
        if error.kind != "config":      # it cannot be written
            raise
        sys.stderr.write("ccproxy: %s\nNothing was written.  What it needs:\n" % printable(
            error.message, 1000))
        say(set_up.edit("", set_up.entries({}, target, windows), path))
        return 1
    if not dry:
        show_next_steps(invocation, name, path, target)
    return 0


# === COMMAND LINE ===========================================================
# Flags from the option table, the config file, the start-up screen, and
# `main`.  What is wrong with the configuration is one line on standard error
# and exit status 2; an address that is taken is status 1.


REST_MARKED, REST_OPEN = "[-- ARGUMENTS]", "[ARGUMENTS]"     # behind `--`; also without it


class Command(NamedTuple):
    """One word that may stand first on the command line.  `arguments` are argparse's."""

    run: Callable[[Invocation], int]    # gives the exit status
    help: str
    example: str                        # what stands behind `python3 ccproxy.py`
    arguments: Tuple[Tuple[str, Json], ...] = ()
    rest: str = ""                      # REST_MARKED or REST_OPEN: arguments of another program
    lenient: bool = False               # whether it runs with settings that are wrong


OTHER_WORDS = {     # words that may stand first and are no commands of their own
    "serve": "start the proxy, as without a command",
    "help": "show this, or the help of a command", "version": "show the version"}
COMMON_FLAGS: Tuple[Tuple[str, Json], ...] = (
    ("--config", {"metavar": "FILE", "help": "the config file (default: config.json beside "
                  "ccproxy.py, if there is one)"}),
    ("--env-file", {"metavar": "FILE", "default": "", "help": "a .env file: counts below "
                    "the environment itself"}),
    ("--demo", {"action": "store_true", "help": "answer from inside the program, with any key or "
                "none"}))
SERVE_FLAGS: Tuple[Tuple[str, Json], ...] = (
    ("--check", {"action": "store_true", "help": "print the options that are not at their "
                 "defaults, and end"}),
    ("--all", {"action": "store_true", "help": "with --check: print every option"}),
    ("--while-stdin", {"action": "store_true", "help": "end when standard input ends, for "
                       "programs that start this one"}),
    ("--version", {"action": "version", "version": "ccproxy " + __version__}),
    ("--watch", {"action": "store_true", "help": "start again, without losing a request, when "
                 "ccproxy.py, the config file, credentialsFile or the --env-file changes"}),
    ("--help-all", {"action": "store_true", "help": "show every option"}))
NO_VALUE = {"action": "help"}
MAIN_OPTIONS = ("port", "host", "upstream", "defaultModel", "allowedModels", "credentialsFile",
                "clientKey", "adminKey", "usageDb", "logLevel")     # --help shows these alone


def flags_of(name: str) -> Dict[str, str]:
    """The flags of a command ("": none), and how many words each takes behind it: "one", "none",
    or "word" for true or false, which may be left out."""
    known = {flag_name(option): "word" if option.kind == "bool" else "one" for option in OPTIONS}
    known.update((flag_name(option), "one") for option in REMOVED_OPTIONS)
    arguments = COMMANDS[name].arguments if name else (*SERVE_FLAGS, ("-p", {}), ("-h", NO_VALUE))
    known.update((flag, "none" if "action" in row else "one")
                 for flag, row in (*COMMON_FLAGS, *arguments) if flag[0] == "-")
    return {**known, "--help": "none"}


def take_flags(argv: List[str], flags: Mapping[str, str]) -> Tuple[List[str], List[str]]:
    """(the flags at the start of a command line, each with its value in one word; the rest).  Only
    flags in full spelling count."""
    taken, at = [], 0
    while at < len(argv):
        flag, equals, value = argv[at].partition("=")
        if flag not in flags:
            break
        following, at = argv[at + 1:at + 2], at + 1
        values = [value] if equals else values_of(flags[flag], following)
        at += len(values) if values is following else 0
        taken.append("=".join(["--port" if flag == "-p" else flag, *values]))
    return taken, argv[at:]


def values_of(takes: str, following: List[str]) -> List[str]:
    """The value of a flag without `=`: the word that follows it, where it takes that."""
    if takes == "none":
        return []
    is_value = takes == "one" or bool(following) and following[0].lower() in BOOLEAN_WORDS
    return following if is_value else ["true"]


def split_arguments(argv: List[str]) -> Tuple[str, List[str], List[str]]:
    """(command, its own words, those of the program that it starts).  Ends the program with one
    line on a word that is no command."""
    own, argv = take_flags(argv, flags_of(""))
    word, argv = (argv[0], argv[1:]) if argv and argv[0][:1] != "-" else ("", argv)
    if word == "version":
        return "", [*own, "--version", *argv], []
    if word == "help":
        word, argv = argv[0] if argv else "", ["--help", *argv[1:]]
    if word in ("", "serve"):
        return "", own + argv, []
    if word not in COMMANDS:
        complain("there is no such command%s; --help lists them, without one the proxy starts"
                 % meant(word, [*COMMANDS, *OTHER_WORDS, "--demo", *map("run ".__add__, CLIENTS)]))
    return (word, *split_rest(COMMANDS[word], own, argv, flags_of(word)))


def split_rest(command: Command, own: List[str], argv: List[str],
               flags: Mapping[str, str]) -> Tuple[List[str], List[str]]:
    """(a command's own words, those of the program that it starts): what follows `--`, or from the
    first word on, behind that program's name, that is none of the command's flags."""
    if command.rest == REST_OPEN:
        before, argv = take_flags(argv, flags)
        own = own + before
        if argv[:1] not in ([], ["--"]):
            if argv[0][:1] == "-":
                refuse_arguments("run", "unrecognized arguments: " + argv[0])
            behind, rest = take_flags(argv[1:], flags)
            return [*own, argv[0], *behind], rest[1:] if rest[:1] == ["--"] else rest
    if command.rest and "--" in argv:
        return own + argv[:argv.index("--")], argv[argv.index("--") + 1:]
    return own + argv, []


def new_parser(name: str, **words: Any) -> Any:
    import argparse
    parser = argparse.ArgumentParser(prog=program_name() + (name and " " + name),
                                     allow_abbrev=False, **words)
    parser.error = partial(refuse_arguments, name)      # type: ignore[method-assign, assignment]
    parser._print_message = lambda text, file=None: say(text)   # type: ignore  # also a full disk
    return parser


def main_parser(whole: bool = False) -> Any:
    """The parser of a command line without a command, which starts the proxy; `whole`: its help
    shows every option."""
    import argparse
    lines = {name: row.help for name, row in COMMANDS.items()}
    commands = "".join("  %-9s  %s\n" % row for row in {**lines, **OTHER_WORDS}.items())
    parser = new_parser(
        "", usage="%(prog)s [COMMAND] [--check] [--demo] [--watch] [--OPTION VALUE ...]",
        description="Use a Command Code subscription from any OpenAI or Anthropic client.\n\n"
                    "commands (each has its own --help; without one the proxy starts):\n"
                    + commands,
        epilog="Each option is also an environment variable (in brackets) and an entry of\n"
               "config.json under its name in camelCase. Flags win over the environment,\n"
               "that over the file.%s\n\n"
               "Example: %s --port 8080 --log-level debug"
               % ("" if whole else " --help-all shows the other options.", program_name()),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, known in SERVE_FLAGS:
        parser.add_argument(flag, **known)
    return parser


def command_parser(name: str, command: Command) -> Any:
    """The parser of one command."""
    words = " ".join("[%s]" % flag if "action" in known else
                     "[%s %s]" % (flag, known.get("metavar", flag[2:].upper())) if flag[0] == "-"
                     else known["metavar"] for flag, known in command.arguments)
    parser = new_parser(
        name, usage="%%(prog)s %s%s[--OPTION VALUE ...]%s" % (
            words, " " if words else "", command.rest and " " + command.rest),
        description=command.help[0].upper() + command.help[1:] + ".",
        epilog="The options of --help-all hold here too. Example: %s %s"
               % (program_name(), command.example))
    for flag, known in command.arguments:
        parser.add_argument(flag, **known)
    return parser


def add_options(parser: Any, shown: Iterable[str]) -> None:
    """The option table as flags; help shows those that are named."""
    import argparse
    shown = set(shown)
    for option in OPTIONS:
        default = "none" if option.default in ("", [], {}) else \
            str(option.default).lower() if option.kind == "bool" else option.default
        words = "%s (default: %s) [%s]" % (option.help, default,
                                           ", ".join(environment_names(option)))
        flags = [flag_name(option)] + ["-p"] * (option.name == "port")
        parser.add_argument(*flags, dest="option " + option.name,
                            help=words.replace("%", "%%") if option.name in shown
                            else argparse.SUPPRESS,
                            metavar="|".join(option.choices) if option.kind == "choice"
                            else option.kind.upper(),
                            **({"nargs": "?", "const": "true"} if option.kind == "bool" else {}))
    for option in REMOVED_OPTIONS:
        parser.add_argument(flag_name(option), dest="option " + option.name, nargs="?", const="",
                            help=argparse.SUPPRESS)


def read_arguments_of(argv: List[str]) -> Tuple[str, Dict[str, str], Any, List[str]]:
    """(command, options given as flags, the other arguments, those of a program to start).  Ends
    the program on --help, or with one line on a flag that does not exist."""
    name, argv, rest = split_arguments(argv)
    whole = not name and "--help-all" in argv
    parser = command_parser(name, COMMANDS[name]) if name else main_parser(whole)
    for flag, known in COMMON_FLAGS:
        parser.add_argument(flag, **known)
    add_options(parser, () if name else [option.name for option in OPTIONS] if whole
                else MAIN_OPTIONS)
    if whole:
        parser.print_help()
        raise SystemExit(0)
    given = parser.parse_args(argv)
    every = vars(given)
    flags = {option.name: every["option " + option.name] for option in OPTIONS + REMOVED_OPTIONS
             if every["option " + option.name] is not None}
    return name, flags, given, rest


def meant(word: str, known: Iterable[str]) -> str:
    """A question after what a mistyped word is nearest to; nothing where nothing is near."""
    import difflib
    bare = {one.lstrip("-"): one for one in known}      # dashes would make all flags look alike
    near = difflib.get_close_matches(word.lstrip("-")[:50], list(bare), 1)
    return " (did you mean %s?)" % bare[near[0]] if near else ""


def refuse_arguments(name: str, message: str) -> None:
    """What argparse says of bad arguments of a command, without the values of those it does not
    know: one may be a secret behind a mistyped name."""
    said, _, rest = message.partition("unrecognized arguments: ")
    if not said and rest:
        flags = [word.partition("=")[0] for word in rest.split() if word.startswith("-")]
        message = "unrecognized arguments: " + (" ".join(flags) or rest) + (
            meant(flags[0], flags_of(name)) if flags else "")
    complain("%s (%s --help)" % (message, " ".join(filter(None, [program_name(), name]))))


def operator_lines(app: App, unused: str) -> List[str]:
    """What the start-up screen says of the operator's keys; nothing where there are none."""
    operator = app.operator
    if not operator.keys:
        return []
    who = "callers with the clientKey" if operator.client_key else "callers on this machine"
    lines = ["  keys      %s" % unused] if unused else [
        "  keys      %d of %s, for %s without one of their own; %s" % (
            len(operator.keys), operator.source, who, app.config.routing_policy)]
    if readable_by_others(operator.source):
        lines.append("  warning   other accounts of this machine can read %s: chmod 600 it."
                     % operator.source)
    return lines


def welcome(app: App, source: str, host: str, port: int, unused: str = "") -> str:
    """The start-up screen."""
    local = local_address(host, port)
    key = "" if app.demo else " -H 'Authorization: Bearer user_...'"
    upstream = "inside this program (--demo)" if app.demo else upstream_address(app)
    lines = [
        "ccproxy %s on http://%s:%d" % (__version__, bracketed(host), port),
        "  upstream  " + upstream, "  config    " + source,
        "  page      %s/dashboard" % local,
        *(["  backends  " + ", ".join(app.vendors)] if app.vendors else []),
        "  try       curl %s/v1/chat/completions%s \\" % (local, key),
        "              -H 'Content-Type: application/json' \\",
        "              -d '{\"messages\":[{\"role\":\"user\",\"content\":\"Say hello.\"}]}'",
        *operator_lines(app, unused)]
    if app.config.upstream == "provider":
        lines.append("  note      the documented API (upstream: provider): plans without API "
                     "access get a 403 upgrade_required.")
    elif not app.demo:
        lines.append("  note      Command Code's vendor objects to use of %s outside its own CLI "
                     "and has announced bans; the README explains the risk." % ALPHA.path)
    if not LOOPBACK.fullmatch(host):
        lines.append("  warning   reachable from other machines, over plain HTTP: put TLS in "
                     "front, callers' keys pass through here.")
    return "\n".join(lines) + "\n"


def describe_config(settings: Settings, whole: bool) -> str:
    """The configuration in effect, an option a line, with where each value came from: what differs
    from its default, and behind that the rest where it is wanted."""
    rows = []
    for option in OPTIONS:
        value = getattr(settings.config, snake_case(option.name))
        shown = '"(secret)"' if option.secret and value else redact(json.dumps(value))
        differs = value != read_value(option, option.default, "default")
        rows.append((differs, option.name, shown, settings.sources[option.name]))
    rows = [row for row in rows if row[0]] + [row for row in rows if whole and not row[0]]
    width = max((len(row[1]) for row in rows), default=0)
    lines = ["%s  %s  (%s)\n" % (name.ljust(width), shown, source)
             for _, name, shown, source in rows]
    left = len(OPTIONS) - len(rows)
    return "".join(lines) + ("default values: %s (--check --all shows them)\n" % counted(
        left, "option") if left else "")


def run_selftest(app: App) -> int:
    """The selftest, on ports and with limits of its own."""
    app.config = app.config._replace(host="127.0.0.1", port=0, use_provider_models=False,
                                     allowed_models=[], model_aliases={}, cli_version="1.0.0",
                                     default_model=DEFAULT_MODEL, include_reasoning=True,
                                     usage_db="")
    app.limits = app.limits._replace(backoff=(0.01, 0.01))
    for logger in (app.log, logging.getLogger("asyncio")):
        logger.setLevel(logging.ERROR)
    return 0 if asyncio.run(selftest(app)) else 1


def make_app(settings: Settings) -> App:
    """A proxy of these settings that does not listen yet.  Raises ProxyError `config`."""
    config = settings.config
    check_surroundings(config)
    app = new_app(config, Limits(), open_log(config))
    app.operator, app.settings = settings.operator, settings
    app.vendors = vendor_backends(settings.vendors)
    return app


def serve(invocation: Invocation) -> int:
    """Run the proxy until a signal ends it."""
    settings, demo = invocation.settings, invocation.given.demo
    config, app = settings.config, make_app(settings)
    app.sockets, app.restartable = take_over(config), True
    hear_of_children()
    if invocation.given.watch:
        if not can_restart(app):
            raise ProxyError("config", "--watch: this platform cannot start a program again in "
                             "its place.")
        app.watched = watched_marks(settings)
    source = settings.file_name if settings.entries else "none (all defaults)"

    def announce(host: str, port: int) -> None:
        say(welcome(app, source, host, port, settings.unused))
        log_warnings(app, settings.warnings)

    if invocation.given.while_stdin:
        end_with_stdin()
    give_memory_back()
    proof_entry(app, "", config.port)       # which makes the key
    try:
        asyncio.run(run_proxy(app, demo, announce))
        if app.restarting:
            start_again(app)
    except OSError as error:
        taken = error.errno in (errno.EADDRINUSE, errno.EACCES, errno.EPERM)
        complain("cannot listen on %s port %d: %s" % (
            config.host, config.port, os.strerror(error.errno) if error.errno and error.errno > 0
            else error) + "; --port chooses another" * taken, 1 if taken else 2)
    except KeyboardInterrupt:       # Windows, before the signals are watched
        return 0
    return 0


JSON_FLAG = ("--json", {"action": "store_true", "help": "print JSON instead of a table"})


def client_argument(names: Iterable[str]) -> Tuple[str, Json]:
    return "client", {"choices": list(names), "metavar": "|".join(names), "help": "the program"}


CLIENT_FLAGS: Tuple[Tuple[str, Json], ...] = (
    ("--model", {"help": "its model (default: defaultModel)"}),
    ("--url", {"metavar": "URL", "help": "the proxy to use, such as another host's (default: as "
               "host and port say)"}))

USAGE_FLAGS: Tuple[Tuple[str, Json], ...] = (
    ("--since", {"default": "7d", "help": "from then on: 30m, 12h, 7d, 4w, or a date such as "
                 "2026-11-01 (default: 7d)"}),
    ("--by", {"default": "model", "choices": sorted(USAGE_GROUPS), "help": "what makes a line "
              "(default: model)"}),
    JSON_FLAG, ("--csv", {"action": "store_true", "help": "print CSV, without the total"}))

COMMANDS: Dict[str, Command] = {
    "run": Command(run_client, "start a client by way of a running proxy, or of one of its own",
                   'run claude --demo -p "Say hello."', (client_argument(CLIENTS), *CLIENT_FLAGS),
                   REST_OPEN),
    "env": Command(show_environment, "print the environment with which a client comes here",
                   "env claude --shell fish", (client_argument(CLIENTS), *CLIENT_FLAGS, (
                       "--shell", {"choices": sorted(SHELLS), "help": "for this shell (default: "
                                   "the one in use)"}))),
    "setup": Command(set_up_client, "write into a client's own settings what leads it here",
                     "setup claude --dry-run", (client_argument(SET_UPS), *CLIENT_FLAGS, (
                         "--undo", {"action": "store_true", "help": "bring them back"}), (
                         "--dry-run", {"action": "store_true", "help": "only say what would be "
                                       "done"}))),
    "models": Command(show_models, "list the models: context, output, vision, efforts, plan",
                      "models --json", (JSON_FLAG,)),
    "doctor": Command(examine, "find out why something does not work, and what to do",
                      "doctor --json", (JSON_FLAG, CLIENT_FLAGS[1], (
                          "--generate", {"action": "store_true", "help": "ask for one short answer "
                                         "too, with the key at hand"}),
                       ("--accept-upstream-errors", {"action": "store_true", "help": "the same; an "
                        "error that the upstream answers is a success here"})), lenient=True),
    "top": Command(show_top, "watch a running proxy: what runs, what ran, errors, tokens", "top",
                   (("--url", {"metavar": "URL", "help": "where it is (default: as host and port "
                               "say); wants its adminKey where it is another machine"}),
                    ("--once", {"action": "store_true", "help": "print it once and end"}))),
    "usage": Command(show_usage_log, "add up the requests that usageDb holds",
                     "usage --usage-db auto --since 7d --by day", USAGE_FLAGS),
    "service": Command(run_service, "keep the proxy running: systemd, launchd, or a task of "
                       "Windows", "service install --port 8080 --dry-run",
                       (("action", {"choices": SERVICE_ACTIONS, "metavar": "|".join(
                           SERVICE_ACTIONS), "help": "what to do with it"}),
                        ("--system", {"action": "store_true", "help": "as a unit of the system's "
                                      "manager (systemd), which needs root"}),
                        ("--dry-run", {"action": "store_true", "help": "print what would be done, "
                                       "and do nothing"})), REST_MARKED),
    "selftest": Command(lambda invocation: run_selftest(make_app(invocation.settings)),
                        "try every feature against the upstream inside the program", "selftest")}


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program; gives its exit status."""
    name, flags, given, rest = read_arguments_of(sys.argv[1:] if argv is None else argv)
    try:
        lenient = bool(name) and COMMANDS[name].lenient
        settings = (read_what_holds if lenient else read_settings)(flags, given.config,
                                                                   given.env_file)
        if name or given.check:         # else they are logged
            for text in settings.warnings:
                warn("ccproxy: warning: %s\n" % text)
        if not name and given.check:
            check_surroundings(settings.config)
            return 0 if say(describe_config(settings, given.all)) else 1
        run = COMMANDS[name].run if name else serve
        return run(Invocation(given, rest, settings))
    except ProxyError as error:
        complain(error.message)
    except KeyboardInterrupt:       # Ctrl-C in a command that waits
        show_progress("")
        return 130
    return 2


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    leave(main())
