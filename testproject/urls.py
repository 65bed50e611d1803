from __future__ import annotations

from django.apps import apps
from django.contrib import admin
from django.urls import URLPattern, URLResolver, include, path

urlpatterns: list[URLPattern | URLResolver] = [
    path("", include("testproject.shop.urls")),
    path("admin/", admin.site.urls),
]

if apps.is_installed("django_rq"):
    urlpatterns.append(path("django-rq/", include("django_rq.urls")))
