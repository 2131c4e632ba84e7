"""What locust runs: users who send a text of $DATA for one of $MODELS models, both drawn at random.

Each does so every $INTERVAL seconds on average. The times between two requests are random
(exponential), so those of all users together arrive as a Poisson process, however long the answers
take. With an interval of 0, a user sends the next request as soon as the last one is answered.
"""

import os
import random
import time

import pandas as pd
from locust import FastHttpUser, task

TEXTS = pd.read_csv(os.environ["DATA"], keep_default_na=False)["text"].tolist()
MODELS, INTERVAL = int(os.environ["MODELS"]), float(os.environ["INTERVAL"])


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
        body = {"model": str(random.randrange(MODELS)), "input": random.choice(TEXTS)}
        self.client.post("/v1/classify", json=body, name="classify")
