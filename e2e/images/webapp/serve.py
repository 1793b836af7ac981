"""The web application of the image "web": a Django site about the readings of
weather stations, which are an SQLite database of 100 MB beside it.

    /        the latest readings of one station, by the index, as a page with
             statistics by pandas
    /all     the same statistics over every reading: the whole file is read

Both say how many modules were imported.
"""

import os
import sys
import threading

import numpy
import pandas
import sqlalchemy
import waitress
from django.conf import settings

HERE = os.path.dirname(os.path.abspath(__file__))
DATA = os.path.join(HERE, "readings.sqlite")

settings.configure(
    SECRET_KEY="none: nobody logs in",
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    USE_TZ=True,
    INSTALLED_APPS=[
        "django.contrib.admin",
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.humanize",
        "django.contrib.messages",
        "django.contrib.sessions",
    ],
    MIDDLEWARE=[
        "django.middleware.security.SecurityMiddleware",
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.common.CommonMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
    ],
    TEMPLATES=[
        {
            "BACKEND": "django.template.backends.django.DjangoTemplates",
            "DIRS": [HERE],
            "APP_DIRS": True,
            "OPTIONS": {
                "context_processors": [
                    "django.template.context_processors.request",
                    "django.contrib.auth.context_processors.auth",
                    "django.contrib.messages.context_processors.messages",
                ]
            },
        }
    ],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": "file:%s?mode=ro&immutable=1" % DATA,
            "OPTIONS": {"uri": True},
        }
    },
)

from django.core.wsgi import get_wsgi_application  # noqa: E402

application = get_wsgi_application()

from django.contrib import admin  # noqa: E402
from django.db import models  # noqa: E402
from django.shortcuts import render  # noqa: E402
from django.urls import path  # noqa: E402


class Reading(models.Model):
    station = models.IntegerField()
    at = models.IntegerField()
    temperature = models.FloatField()
    humidity = models.FloatField()
    pressure = models.FloatField()
    remark = models.TextField()

    class Meta:
        app_label = "readings"
        db_table = "reading"
        managed = False


COLUMNS = ["temperature", "humidity", "pressure"]


def page(request, frame, title):
    return render(
        request,
        "page.html",
        {
            "title": title,
            "modules": len(sys.modules),
            "rows": len(frame),
            "table": frame[COLUMNS].describe().to_html(),
            "norm": float(numpy.linalg.norm(frame["temperature"])),
        },
    )


def station(request):
    rows = Reading.objects.filter(station=417).order_by("-at")[:200]
    frame = pandas.DataFrame(list(rows.values("at", *COLUMNS)))
    return page(request, frame, "Station 417")


def everything(request):
    engine = sqlalchemy.create_engine("sqlite:///file:%s?mode=ro&immutable=1&uri=true" % DATA)
    with engine.connect() as connection:
        # remark is the last column of each row: no page is left out.
        query = sqlalchemy.text("SELECT station, avg(temperature) temperature, avg(humidity) humidity,"
                                " avg(pressure) pressure, sum(length(remark)) remarks"
                                " FROM reading NOT INDEXED GROUP BY station")
        frame = pandas.DataFrame(connection.execute(query).all())
    with open(DATA, "rb") as f:  # and those of the index
        while f.read(1 << 20):
            pass
    return page(request, frame, "All stations")


urlpatterns = [
    path("", station),
    path("all", everything),
    path("admin/", admin.site.urls),
]

if __name__ == "__main__":
    # Whoever started this holds its standard input; without him there is no
    # reason to stay.
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    waitress.serve(application, host="127.0.0.1", port=int(sys.argv[1]), threads=2, _quiet=True)
