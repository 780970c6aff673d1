"""The words of a Content-Security-Policy that more than one concern knows."""

_NAMES = (
    "default-src script-src script-src-elem script-src-attr style-src style-src-elem style-src-attr img-src font-src "
    "connect-src media-src object-src frame-src child-src worker-src manifest-src base-uri form-action "
    "frame-ancestors sandbox report-to report-uri require-trusted-types-for trusted-types upgrade-insecure-requests"
)

DIRECTIVES = tuple(_NAMES.split())
"""The directives of CSP Level 3 and of the specifications that add to it."""
