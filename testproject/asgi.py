from __future__ import annotations

import os

from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler
from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "testproject.settings")

# The demo has no web server in front of it that would serve the admin's files.
application = ASGIStaticFilesHandler(get_asgi_application())
