"""Write the synthetic sample that is used if the real data is missing.

    .venv/bin/python tests/make_sample.py   # writes csv/USvideos_sample.csv, always the same bytes

Everything in it is made up: a seeded generator draws titles, channels and figures from the word
lists below. It resembles the real file: its 16 columns and quirks, all 16 categories in roughly
their real shares, videos that trend on several days, words shared between categories, and some
wrong labels, so that no model gets everything right.
"""

import csv
import io
import random
from datetime import datetime, timedelta
from pathlib import Path

FILE = Path(__file__).parents[1] / "csv" / "USvideos_sample.csv"
SEED = 42
VIDEOS = 600
OWN_WORD = 0.66  # share of topic words from the video's own category; the rest are from any
WRONG_LABEL = 0.04

# Category id: (share of the videos in percent, topic words).
CATEGORIES = {
    24: (24, "celebrity host interview awards comedian show episode season reality talent judge "
        "audition couple gossip premiere cast star late night guest prank reunion drama scandal"),
    10: (16, "official audio lyric remix album single band singer acoustic concert tour guitar "
        "rapper chorus melody cover live session feat duet ballad vinyl beat"),
    26: (10, "makeup hair tutorial outfit recipe kitchen cake baking diy decor nails skincare "
        "haul closet style lipstick foundation routine thrift braid organize pumpkin frosting"),
    23: (8, "comedy sketch parody roommate awkward joke funny standup roast skit impression "
        "sarcastic boss neighbour costume laugh spoof improv mishap gag"),
    22: (8, "vlog family house moving storytime baby wedding life update morning husband daughter "
        "birthday birth surprise apartment pregnancy goodbye feelings diary"),
    25: (6, "senate president breaking report investigation election mayor storm border governor "
        "press court protest police statement anchor minister headlines crisis"),
    28: (6, "phone review robot laptop camera battery experiment rocket physics engineer laser "
        "processor unboxing satellite screen telescope drone software magnet"),
    1: (6, "trailer teaser film scene director animation villain sequel cinema studio superhero "
        "clip screenplay short remake reel stuntman credits"),
    17: (5, "goal match playoffs quarterback dunk league coach finals touchdown stadium boxing "
        "tennis champion overtime rookie penalty sprint highlights"),
    27: (4, "history explained lesson science language brain university maths essay ancient "
        "mystery theory economics geography grammar biology professor"),
    15: (2, "puppy cat kitten dog rescue shelter wildlife parrot elephant aquarium zoo turtle"),
    20: (2, "gameplay speedrun console boss level multiplayer controller minecraft arcade patch"),
    19: (1, "travel island hotel flight passport backpack beach resort street food market"),
    2: (1, "car engine truck racing garage drift electric motor tyre restoration"),
    43: (0.3, "season pilot series finale recap episode"),
    29: (0.3, "charity march volunteers donate nonprofit awareness campaign"),
}  # fmt: skip
SHARED = (
    "new best first last world big little day home night time people real never ever every week "
    "challenge try trying love girl boy money secret why how what happened inside behind story "
    "full part one two hundred hours million making makes worst perfect wrong crazy american "
    "london summer winter christmas black white red golden back"
).split()
DECORATION = (
    *[""] * 5, " | Official Video", " (2018)", " ft. Mira Vale", "!!", " 😂", " 🔥", ' "uncut"',
    " - Part 2", " [4K]", "… again?", " w/ Ünal & Zoë",
)  # fmt: skip
TAG_SEPARATOR = "\x1f"  # replaced when the file is written
NAMES = "Nova Atlas Juniper Orbit Marlow Pixel Harbor Velvet Quill Ember Sable Tango".split()


def make_video(draw: random.Random, number: int) -> dict:
    """Draw a video's row for its first trending day; the `None` values depend on the day."""
    ids, shares = list(CATEGORIES), [share for share, _ in CATEGORIES.values()]
    # each category once, so that none is missing, then at random by their shares
    category = ids[number] if number < len(ids) else draw.choices(ids, shares)[0]

    def topic_word() -> str:
        source = category if draw.random() < OWN_WORD else draw.choices(ids, shares)[0]
        return draw.choice(CATEGORIES[source][1].split())

    words = [topic_word() for _ in range(draw.randint(2, 4))]
    words += draw.choices(SHARED, k=draw.randint(1, 4))
    draw.shuffle(words)
    title = " ".join(words).title() if draw.random() < 0.85 else " ".join(words).upper()
    channel = f"{NAMES[(category + number % 3) % len(NAMES)]} {draw.choice(NAMES)}"
    tags = [topic_word() for _ in range(draw.randint(0, 8))]
    link = f"https://example.com/{channel.split()[0].lower()}"
    text = f'{title}: {" ".join(draw.choices(SHARED, k=6))}.\\n\\nSubscribe, "{channel}" ► {link}'
    published = datetime(2017, 11, 13) + timedelta(minutes=draw.randrange(200 * 24 * 60))
    video_id = "".join(draw.choices("ABCDEFGHabcdefgh0123456789_-", k=11))
    if draw.random() < WRONG_LABEL:
        category = draw.choice(ids)
    return {
        "video_id": video_id,
        "trending_date": published.date() + timedelta(days=draw.randint(1, 3)),
        "title": title + draw.choice(DECORATION),
        "channel_title": channel,
        "category_id": category,
        "publish_time": published.strftime("%Y-%m-%dT%H:%M:%S.000Z"),
        "tags": TAG_SEPARATOR.join(tags) or "[none]",
        "views": draw.randint(5_000, 2_000_000),
        "likes": None,
        "dislikes": None,
        "comment_count": None,
        "thumbnail_link": f"https://example.com/vi/{video_id}/default.jpg",
        "comments_disabled": draw.random() < 0.02,
        "ratings_disabled": draw.random() < 0.005,
        "video_error_or_removed": draw.random() < 0.001,
        "description": text if draw.random() > 0.03 else "",
    }


def on_day(video: dict, day: int) -> dict:
    """Return a video's row `day` days later: only the date and the counts change."""
    views = int(video["views"] * (1 + 0.4 * day))
    ratings = 0 if video["ratings_disabled"] else views
    return video | {
        "trending_date": video["trending_date"] + timedelta(days=day),
        "views": views,
        "likes": ratings // 30,
        "dislikes": ratings // 900,
        "comment_count": 0 if video["comments_disabled"] else views // 200,
    }


def make_sample() -> str:
    """Return the sample as the text of a CSV file, one row per video and day, sorted by day."""
    draw = random.Random(SEED)
    videos = [make_video(draw, number) for number in range(VIDEOS)]
    rows = [
        on_day(video, day)
        for video in videos
        for day in range(min(14, 1 + int(draw.expovariate(1 / 3.5))))
    ]
    rows.sort(key=lambda row: row["trending_date"])
    file = io.StringIO()
    writer = csv.DictWriter(file, [*rows[0]], lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    for row in rows:
        writer.writerow(row | {"trending_date": row["trending_date"].strftime("%y.%d.%m")})
    # as in the real file: tags are "a"|"b", which is not valid CSV
    return file.getvalue().replace(TAG_SEPARATOR, '"|"')


if __name__ == "__main__":
    FILE.write_text(make_sample(), encoding="utf-8")
    print(f"{FILE}: {VIDEOS} synthetic videos")
