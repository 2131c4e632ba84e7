"""What locust runs: users who send the bodies in $BODIES, one every $INTERVAL seconds each."""

import os
import random
from pathlib import Path

from locust import FastHttpUser, constant_pacing, task

BODIES = Path(os.environ["BODIES"]).read_text(encoding="utf-8").splitlines()
HEADERS = {"content-type": "application/json"}


class User(FastHttpUser):
    """Sends a request at fixed times, however long the last one took."""

    wait_time = constant_pacing(float(os.environ["INTERVAL"]))

    @task
    def classify(self) -> None:
        """Classify one text with one of the models."""
        body = random.choice(BODIES)
        self.client.post("/v1/classify", data=body.encode(), headers=HEADERS, name="classify")
