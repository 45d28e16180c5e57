"""What generated requests leave out. Read by `schemathesis`, see `test_contract.py`."""

from __future__ import annotations

import schemathesis

UNKNOWN = "x-schemathesis-unknown-property"


@schemathesis.hook
def filter_case(_context: schemathesis.HookContext, case: schemathesis.Case) -> bool:
    """No request is at fault for a header that the server does not know: proxies add their own."""
    return UNKNOWN not in (case.headers or {})
