// Plays the step of the chosen plan: tiles, cursor and words follow one number, the moment.
(() => {
  "use strict";
  const root = document.getElementById("explain");
  const links = [...document.querySelectorAll("nav.depths a")];
  followSections(links);
  const data = document.getElementById("explain-data");
  if (!root || !data) return;

  const STATES = { w: "waits", f: "forward", k: "keeps", p: "part", d: "dropped", a: "again", b: "backward", x: "done" };
  const tales = JSON.parse(data.textContent);
  const figures = [...root.querySelectorAll(".tale")];
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  const plan = part("plan"), play = part("play"), back = part("back"), next = part("next");
  const place = part("place"), speed = part("speed"), count = part("count"), words = part("words");
  let tale = Number(plan.value), moment = 0, timer = 0;

  const last = () => tales[tale].texts.length - 1;

  function show() {
    const told = tales[tale], figure = figures[tale];
    figures.forEach((one, i) => { one.hidden = i !== tale; });
    figure.querySelectorAll(".block").forEach((block, i) => {
      block.dataset.state = STATES[told.states[moment][i]];
      block.style.setProperty("--fill", told.fills[moment][i] + "%");
    });
    figure.style.setProperty("--at", (moment + 1) / told.texts.length);
    figure.classList.add("playing");
    place.max = last();
    place.value = moment;
    place.setAttribute("aria-valuetext", `moment ${moment + 1} of ${last() + 1}`);
    count.textContent = `${moment + 1} of ${last() + 1}`;
    words.textContent = told.texts[moment];
    // not `disabled`, which would take the focus away from under the keys
    back.setAttribute("aria-disabled", moment === 0);
    next.setAttribute("aria-disabled", moment === last());
  }

  function go(to) {
    moment = Math.max(0, Math.min(last(), to));
    show();
    if (timer && moment === last()) pause();
  }

  function pause() {
    clearInterval(timer);
    timer = 0;
    play.textContent = "Play";
    // a voice that is behind the picture helps nobody: it speaks when the picture stands
    words.parentElement.setAttribute("aria-live", "polite");
  }

  function start() {
    if (moment === last()) moment = 0;
    words.parentElement.setAttribute("aria-live", "off");
    play.textContent = "Pause";
    timer = setInterval(() => go(moment + 1), Number(speed.value));
    show();
  }

  const toggle = () => (timer ? pause() : start());
  const step = (by) => { if (timer) pause(); go(moment + by); };

  play.addEventListener("click", toggle);
  back.addEventListener("click", () => step(-1));
  next.addEventListener("click", () => step(1));
  place.addEventListener("input", () => { if (timer) pause(); go(Number(place.value)); });
  speed.addEventListener("change", () => { if (timer) { pause(); start(); } });
  plan.addEventListener("change", () => {
    pause();
    const share = moment / Math.max(1, last());
    tale = Number(plan.value);
    go(Math.round(share * last()));
  });
  root.addEventListener("keydown", (event) => {
    const keys = {
      " ": toggle, ArrowRight: () => step(1), ArrowLeft: () => step(-1),
      Home: () => step(-moment), End: () => step(last()),
    };
    const act = keys[event.key];
    // what has keys of its own keeps them
    const isOwn = event.target.closest("select, input") || (event.key === " " && event.target.closest("button"));
    if (!act || isOwn || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act();
  });
  part("controls").hidden = false;
  part("stage").tabIndex = 0;
  show();

  function followSections(anchors) {
    const sections = anchors.map((a) => document.querySelector(a.getAttribute("href")));
    const mark = () => {
      const above = sections.filter((s) => s && s.getBoundingClientRect().top < innerHeight / 3);
      const current = above[above.length - 1] || sections[0];
      anchors.forEach((a, i) => {
        if (sections[i] === current) a.setAttribute("aria-current", "true");
        else a.removeAttribute("aria-current");
      });
    };
    addEventListener("scroll", mark, { passive: true });
    mark();
  }
})();
