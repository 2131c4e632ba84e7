"""What locust runs: users who send one of the bodies in $BODIES every $INTERVAL seconds on average.

The times between two requests of a user are random (exponential), so all of them together arrive as
a Poisson process, however long the answers take. With an interval of 0, each user sends the next
request as soon as the last one is answered.
"""

import os
import random
import time
from pathlib import Path

from locust import FastHttpUser, task

BODIES = Path(os.environ["BODIES"]).read_text(encoding="utf-8").splitlines()
INTERVAL = float(os.environ["INTERVAL"])
HEADERS = {"content-type": "application/json"}


class User(FastHttpUser):
    """Sends requests at times that do not depend on the answers."""

    def on_start(self) -> None:
        """Begin at a time of its own: the first task runs at once."""
        self.due = time.time()
        time.sleep(self.wait_time())

    def wait_time(self) -> float:
        """Return the seconds until the next request is due."""
        self.due += random.expovariate(1 / INTERVAL) if INTERVAL else 0
        return max(0.0, self.due - time.time())

    @task
    def classify(self) -> None:
        """Classify one text with one of the models."""
        body = random.choice(BODIES)
        self.client.post("/v1/classify", data=body.encode(), headers=HEADERS, name="classify")
