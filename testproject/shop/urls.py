from __future__ import annotations

from django.urls import path

from testproject.shop import views

app_name = "shop"
urlpatterns = [
    path("", views.index, name="index"),
    path("stream/", views.stream, name="stream"),
    path("enqueue/", views.enqueue, name="enqueue"),
]
