"""What a verb is asked with: a reason, and the arguments of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django import forms
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from django_saga import interventions
from django_saga.admin.contexts import edited, stored_masked
from django_saga.admin.effects import words
from django_saga.exceptions import SagaError
from django_saga.machine import Action, Effect, Status, standing
from django_saga.models import SagaExecution
from django_saga.operations import Verb

REASON_LIMIT = 2_000  # characters


WHY = gettext_lazy("Why you do this. The audit keeps it, with your name.")


def reason_field(*, required: bool, help_text: Any = WHY) -> forms.CharField:
    """Why something is done: the same on each form that asks for it."""
    return forms.CharField(
        label=gettext_lazy("Reason"),
        required=required,
        max_length=REASON_LIMIT,
        widget=forms.Textarea(attrs={"rows": 2}),
        help_text=help_text,
        error_messages={"required": gettext_lazy("Say why: the audit keeps it.")},
    )


class AskingForm(forms.Form):
    """Tells what it needs from what it may be given as the admin does: by the label."""

    required_css_class = "required"


class VerbForm(AskingForm):
    """Asks for what a verb takes; its token is the one that was seen when it was asked."""

    token = forms.IntegerField(
        widget=forms.HiddenInput,
        error_messages={
            code: gettext_lazy("This takes a confirmation first: look at what will run.")
            for code in ("required", "invalid")
        },
    )

    def __init__(self, verb: Verb, execution: SagaExecution, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execution = execution
        self.takes = verb.takes
        for name in verb.takes:
            self.fields[name] = _FIELDS[name](execution)
        why = _EVIDENCE if verb.name == "skip" else WHY
        self.fields["reason"] = reason_field(required=verb.needs_reason, help_text=why)

    @property
    def note(self) -> str:
        """What is wrong with it as a whole."""
        whole = [*self.non_field_errors(), *self.errors.get("token", [])]
        if not whole and self.errors:
            return _("Nothing was done. Please correct what is marked below.")
        return " ".join(map(str, whole))

    @property
    def arguments(self) -> dict[str, Any]:
        """The verb's own arguments, as its function takes them."""
        return {name: self.cleaned_data[name] for name in self.takes}

    def clean_context(self) -> str:
        try:
            return edited(self.execution, self.cleaned_data["context"])
        except SagaError as error:  # it does not fit, or the code has lost the saga
            raise forms.ValidationError(str(error)) from error

    def clean_standing(self) -> list[str]:
        ticked: list[str] = self.cleaned_data["standing"]
        if len(ticked) < len(self.fields["standing"].choices):  # type: ignore[attr-defined]
            raise forms.ValidationError(_("Tick each effect: you acknowledge that it stands."))
        return ticked

    def clean_confirm(self) -> str:
        typed: str = self.cleaned_data["confirm"]
        if typed.lower() != str(self.execution.pk):
            raise forms.ValidationError(_("That is not the id of this execution."))
        return typed


_EVIDENCE = gettext_lazy(
    "How you know that it had no effect, and that the saga does without it. The audit keeps it."
)


def _step(execution: SagaExecution) -> forms.Field:
    return forms.ChoiceField(
        label=_("Step"),
        choices=steps_by_hand(execution),
        widget=forms.RadioSelect,
    )


def steps_by_hand(execution: SagaExecution) -> list[tuple[str, str]]:
    """The steps that can be marked as done by hand, and what each would then count as."""
    state = execution.state
    if interventions.is_forward(state):
        return [(state.step, _("%(step)s: its act was done") % {"step": state.step})]
    stuck = state.status is Status.STUCK
    steps = interventions.standing_steps(state)
    return [
        (step, _("%(step)s: it was undone") % {"step": step})
        for step in steps
        if stuck or (step == state.step and state.action is Action.COMPENSATE)
    ]


def _context(execution: SagaExecution) -> forms.Field:
    return forms.CharField(
        label=_("Context"),
        initial=stored_masked(execution),
        widget=forms.Textarea(attrs={"rows": 16, "spellcheck": "false", "class": "saga-json"}),
        help_text=_("What is masked keeps its stored value where you leave the mask."),
        strip=False,
    )


def _standing(execution: SagaExecution) -> forms.Field:
    effects = standing(execution.state)
    return forms.MultipleChoiceField(
        label=_("Effects that stand, or may stand"),
        choices=[(effect.step, _line(effect)) for effect in effects],
        required=False,  # that each is ticked is looked at by clean_standing
        widget=forms.CheckboxSelectMultiple,
    )


def _line(effect: Effect) -> str:
    return f"{effect.step}: {words(effect)[1]}"


def _confirm(execution: SagaExecution) -> forms.Field:
    return forms.CharField(
        label=_("Type the id of the execution"),
        help_text=str(execution.pk),
        widget=forms.TextInput(
            attrs={"autocomplete": "off", "spellcheck": "false", "class": "saga-id"}
        ),
    )


_FIELDS: dict[str, Callable[[SagaExecution], forms.Field]] = {
    "step": _step,
    "context": _context,
    "standing": _standing,
    "confirm": _confirm,
}
