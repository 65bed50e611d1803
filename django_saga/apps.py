"""The app: finds the sagas of the installed apps and registers the system checks."""

from __future__ import annotations

from django.apps import AppConfig
from django.utils.module_loading import autodiscover_modules
from django.utils.translation import gettext_lazy as _


class DjangoSagaConfig(AppConfig):
    """Autodiscovers ``sagas.py`` of every installed app, as the admin does ``admin.py``."""

    name = "django_saga"
    verbose_name = _("Sagas")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from django_saga import checks  # noqa: F401

        autodiscover_modules("sagas")
