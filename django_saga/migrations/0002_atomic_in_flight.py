from __future__ import annotations

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("django_saga", "0001_initial"),
    ]

    operations = [
        migrations.AddField(
            model_name="sagaexecution",
            name="atomic",
            field=models.BooleanField(db_default=False, verbose_name="atomic"),
        ),
    ]
