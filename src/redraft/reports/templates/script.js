"use strict";
// The page reads the same without this script: it adds the theme button and the steps of the token view.
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // Storage is refused to some pages opened from disk.
  const recall = () => { try { return localStorage.getItem("redraft-theme"); } catch { return null; } };
  const keep = (theme) => { try { localStorage.setItem("redraft-theme", theme); } catch { /* this visit only */ } };
  const saved = recall();
  if (saved === "dark" || saved === "light") root.dataset.theme = saved;

  function themeButton() {
    const button = document.getElementById("theme");
    const system = matchMedia("(prefers-color-scheme: dark)");
    const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
    const label = () => { button.textContent = dark() ? "Light page" : "Dark page"; };
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      keep(root.dataset.theme);
      label();
    });
    system.addEventListener("change", label);
    label();
  }

  // One trace. `at` is the number of rounds shown; null shows everything without a present round.
  function stepper(trace) {
    const part = (name) => trace.querySelector(`[data-do="${name}"]`);
    const slider = trace.querySelector("input");
    const readout = trace.querySelector("output");
    const columns = [...trace.querySelectorAll(".column")].map((column) => ({
      column,
      rounds: [...column.querySelectorAll(".rd")],
      panel: column.querySelector(".now-panel"),
    }));
    const last = Number(slider.max);
    let at = null;
    let timer = 0;

    function line(label, pieces) {
      const row = document.createElement("div");
      const head = document.createElement("b");
      head.textContent = label;
      row.className = "chips";
      row.append(head, ...pieces.map((piece) => {
        const copy = piece.cloneNode(true);
        copy.textContent = copy.textContent.replace(/\n/g, "");
        return copy;
      }));
      return row;
    }

    function describe({ rounds, panel }) {
      panel.setAttribute("aria-live", timer ? "off" : "polite");
      panel.replaceChildren();
      const text = document.createElement("p");
      panel.append(text);
      if (at === 0) {
        text.textContent = "Prefill has given the first token. No round yet.";
        return;
      }
      const round = rounds[Math.min(at, rounds.length) - 1];
      if (!round) {
        text.textContent = "No rounds: prefill gave all there is.";
        return;
      }
      const { n, tokens, tau, about } = round.dataset;
      const done = at > rounds.length ? `finished in ${rounds.length} rounds` : `round ${n}: ${about}`;
      text.textContent = `${done}; ${tokens} tokens so far, running \u03c4 ${tau}`;
      const proposed = round.querySelector(".proposed");
      panel.append(line("proposed", [...proposed.childNodes]));
      panel.append(line("kept", [...round.children].filter((piece) => piece !== proposed)));
    }

    function show(to, { share = true } = {}) {
      at = to === null ? null : Math.max(0, Math.min(last, to));
      trace.classList.toggle("stepping", at !== null);
      for (const each of columns) {
        each.rounds.forEach((round, index) => {
          round.classList.toggle("future", at !== null && index >= at);
          round.classList.toggle("now", at !== null && index === at - 1);
        });
        if (at !== null) describe(each);
      }
      slider.value = at === null ? last : at;
      slider.setAttribute("aria-valuetext", at === null ? "all rounds" : `round ${at} of ${last}`);
      readout.textContent = at === null ? `all ${last} rounds` : `round ${at} of ${last}`;
      if (share) {
        const hash = at === null ? `#${trace.id}` : `#${trace.id}-round-${at}`;
        try { history.replaceState(null, "", hash); } catch { /* a page that may not have an address */ }
      }
    }

    function stop() {
      clearInterval(timer);
      timer = 0;
      part("play").textContent = "Play";
    }

    function play() {
      if (timer) return stop();
      if (at === null || at >= last) show(0);
      part("play").textContent = "Pause";
      timer = setInterval(() => (at < last ? show(at + 1, { share: false }) : (stop(), show(at))), 600);
    }

    const step = (by) => { stop(); show((at === null ? (by > 0 ? 0 : last + 1) : at) + by); };
    part("back").addEventListener("click", () => step(-1));
    part("next").addEventListener("click", () => step(1));
    part("play").addEventListener("click", play);
    part("all").addEventListener("click", () => { stop(); show(null); });
    slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
    trace.querySelector(".stage").addEventListener("keydown", (event) => {
      if (event.target === slider || event.altKey || event.ctrlKey || event.metaKey) return;
      const jumps = { ArrowRight: () => step(1), ArrowLeft: () => step(-1), Home: () => { stop(); show(0); }, End: () => { stop(); show(last); } };
      if (event.key === " " && event.target.tagName === "BUTTON") return;
      const act = event.key === " " ? play : jumps[event.key];
      if (!act) return;
      event.preventDefault();
      act();
    });
    show(null, { share: false });
    return { trace, show };
  }

  // An address such as #r0-trace-0-round-3 opens that trace at that round.
  function follow(steppers) {
    const found = /^#(r\d+-trace-\d+)(?:-round-(\d+))?$/.exec(location.hash);
    const stepper = found && steppers.find(({ trace }) => trace.id === found[1]);
    if (!stepper) return;
    stepper.trace.open = true;
    stepper.show(found[2] === undefined ? null : Number(found[2]), { share: false });
    stepper.trace.scrollIntoView();
  }

  document.addEventListener("DOMContentLoaded", () => {
    themeButton();
    const steppers = [...document.querySelectorAll(".trace")].map(stepper);
    follow(steppers);
    addEventListener("hashchange", () => follow(steppers));
  });
})();
