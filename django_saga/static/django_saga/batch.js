// Shows how a batch gets on while it runs. All of it works without, with the browser's reload.
"use strict";
{
  const SECONDS = 2;
  const page = () => document.querySelector("#content-main");

  // What has the focus keeps it, and what was typed stays.
  const replace = (fresh) => {
    const old = page();
    const active = old.contains(document.activeElement) ? document.activeElement : null;
    const typed = old.querySelector("#id_reason")?.value;
    old.replaceWith(fresh);
    const remark = fresh.querySelector("#id_reason");
    if (remark && typed) remark.value = typed;
    if (active?.name && active.name !== "csrfmiddlewaretoken") {
      const same = `[name="${active.name}"]` + (active.type === "submit" ? `[value="${active.value}"]` : "");
      fresh.querySelector(same)?.focus();
    }
  };

  const look = async () => {
    if (!page()?.hasAttribute("data-saga-live")) return;
    try {
      const response = await fetch(location.href, { credentials: "same-origin" });
      if (!response.ok || response.redirected) return;
      const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
      const main = fresh.querySelector("#content-main");
      if (main && !document.hidden) replace(document.adoptNode(main));
    } catch (error) {
      // The network is away: look again later.
    }
    setTimeout(look, SECONDS * 1000);
  };

  setTimeout(look, SECONDS * 1000);
}
