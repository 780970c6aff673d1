"""What a client is told that asks for a version which is not served."""

from fastapi_hardening.core.problem import OWN, Problem


class VersionNotServed(Problem):
    """The version that is asked for does not exist, or not on this route."""

    status = 400
    type = OWN + "version-not-served"
    title = "Version not served"


class VersionGone(Problem):
    """The version that is asked for is past its sunset."""

    status = 410
    type = OWN + "version-gone"
    title = "Version gone"
