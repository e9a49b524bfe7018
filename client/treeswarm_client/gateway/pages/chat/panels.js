// The panels beside the conversation: columns where there is room, else drawers above it.

import { byId } from "../shared/dom.js";
import { icon } from "./controls.js";

const NARROW = { list: matchMedia("(max-width: 860px)"), side: matchMedia("(max-width: 1140px)") };
const ICONS = { list: "list", side: "tree" };
const TABS = ["trace", "settings"];

export class Panels {
  /** `view` is what was shown last time, and `onView` is called with what is shown now. */
  constructor(view, onView) {
    this.view = { list: true, side: true, tab: "trace", ...view };
    this.onView = onView;
    this.drawer = null;
    for (const name of Object.keys(NARROW)) {
      const toggle = byId(`toggle-${name}`);
      toggle.append(icon(ICONS[name]));
      toggle.addEventListener("click", () => this.toggle(name));
      NARROW[name].addEventListener("change", () => this.arrange());
    }
    for (const close of document.querySelectorAll(".close-drawer")) {
      close.append(icon("close"));
      close.addEventListener("click", () => this.closeDrawer());
    }
    byId("backdrop").addEventListener("click", () => this.closeDrawer());
    for (const tab of TABS) {
      byId(`tab-${tab}`).addEventListener("click", () => this.choose(tab));
      byId(`tab-${tab}`).addEventListener("keydown", (event) => {
        if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
        const other = TABS.find((name) => name !== tab);
        this.choose(other);
        byId(`tab-${other}`).focus();
      });
    }
    this.arrange();
  }

  toggle(name) {
    if (NARROW[name].matches) {
      if (this.drawer === name) this.closeDrawer();
      else this.openDrawer(name);
    } else {
      this.set({ [name]: !this.view[name] });
    }
  }

  /** Show one tab of the side panel, which is opened if need be. */
  open(tab) {
    this.choose(tab);
    if (NARROW.side.matches) this.openDrawer("side");
    else this.set({ side: true });
  }

  openDrawer(name) {
    this.drawer = name;
    this.arrange();
    byId(name).querySelector("a, button:not(.close-drawer)")?.focus();
  }

  /** Close the drawer, and return whether there was one. */
  closeDrawer() {
    const name = this.drawer;
    if (name === null) return false;
    this.drawer = null;
    this.arrange();
    byId(`toggle-${name}`).focus();
    return true;
  }

  choose(tab) {
    this.set({ tab });
  }

  set(change) {
    this.view = { ...this.view, ...change };
    this.onView(this.view);
    this.arrange();
  }

  arrange() {
    if (this.drawer && !NARROW[this.drawer].matches) this.drawer = null;
    for (const name of Object.keys(NARROW)) {
      const narrow = NARROW[name].matches;
      const open = narrow ? this.drawer === name : this.view[name];
      byId(name).hidden = !open;
      byId(name).classList.toggle("drawer", narrow);
      byId(`toggle-${name}`).setAttribute("aria-expanded", open);
      document.body.classList.toggle(`has-${name}`, open && !narrow);
    }
    byId("backdrop").hidden = this.drawer === null;
    // Neither keys nor screen readers reach what a drawer covers.
    for (const part of document.querySelectorAll(".top, .talk, .list, .side")) part.inert = this.drawer !== null && part.id !== this.drawer;
    for (const tab of TABS) {
      const chosen = tab === this.view.tab;
      byId(tab).hidden = !chosen;
      byId(`tab-${tab}`).setAttribute("aria-selected", chosen);
      byId(`tab-${tab}`).tabIndex = chosen ? 0 : -1;
    }
  }
}
