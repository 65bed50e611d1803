/* Looks again every few seconds while an execution goes on and somebody looks; all works without. */
"use strict";
{
  const MAIN = "content-main";
  const GIVE_UP = 5; // failures one after the other
  let failures = 0;

  const every = () => Number(document.getElementById(MAIN)?.dataset.sagaEvery || 0);

  const isInUse = (main) => {
    const selection = document.getSelection();
    return selection !== null && !selection.isCollapsed && main.contains(selection.anchorNode);
  };

  /* What was unfolded stays so, and the focus where it was. */
  const replace = (main, fresh) => {
    for (const details of main.querySelectorAll("details[id]")) {
      const same = fresh.querySelector(`#${CSS.escape(details.id)}`);
      if (same) same.open = details.open;
    }
    const focused = document.activeElement;
    const href = main.contains(focused) && focused.getAttribute("href");
    const said = main.querySelector("#saga-what")?.textContent;
    main.replaceWith(fresh);
    if (href) fresh.querySelector(`[href="${CSS.escape(href)}"]`)?.focus({ preventScroll: true });
    const says = fresh.querySelector("#saga-what")?.textContent;
    if (says !== said) document.getElementById("saga-heard").textContent = says;
  };

  const look = async () => {
    const main = document.getElementById(MAIN);
    if (document.hidden || isInUse(main)) return;
    const answer = await fetch(location.href, { headers: { "X-Requested-With": "fetch" } });
    if (!answer.ok || answer.redirected) throw new Error(answer.statusText);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const fresh = page.getElementById(MAIN);
    if (!fresh) throw new Error("no page of an execution");
    if (!document.hidden && !isInUse(main)) replace(main, document.adoptNode(fresh));
  };

  const wait = () => {
    const seconds = every();
    if (!seconds || failures === GIVE_UP) return;
    setTimeout(async () => {
      try {
        await look();
        failures = 0;
      } catch {
        failures += 1;
      }
      wait();
    }, seconds * 1000);
  };

  wait();
}
