"""A subprocess that matches an expression against names, because Python's ``re`` cannot be interrupted.

It reads ``{"expression", "names", "seconds", "bytes"}`` as JSON and writes the names that match. It imports nothing
else, so that it starts quickly, and is killed by its own timer.
"""

import json
import re
import resource
import signal
import sys

if __name__ == "__main__":
    asked = json.load(sys.stdin)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (asked["bytes"], asked["bytes"]))
    signal.setitimer(signal.ITIMER_REAL, asked["seconds"])
    whole = re.compile(asked["expression"])
    json.dump([name for name in asked["names"] if whole.fullmatch(name)], sys.stdout)
